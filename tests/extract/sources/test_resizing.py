"""Resizing matches its sources: guided-diffusion's crop, Pillow, and torch without antialiasing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image

from dtpipe.extract.sources.images import resize_image
from dtpipe.manifests.errors import BadImage
from dtpipe.manifests.schema import TransformRecipe
from parts.images import draw_oblong


def recipe(height: int, width: int, **options: object) -> TransformRecipe:
    return TransformRecipe.model_validate({"height": height, "width": width, **options})


def center_crop_restated(image: np.ndarray, px: int) -> np.ndarray:
    """guided-diffusion's rule for squares, restated step by step."""
    current = Image.fromarray(image)
    while min(current.size) >= 2 * px:
        current = current.resize(tuple(side // 2 for side in current.size), resample=Image.Resampling.BOX)
    scale = px / min(current.size)
    current = current.resize(tuple(round(side * scale) for side in current.size), resample=Image.Resampling.BICUBIC)
    array = np.array(current)
    top, left = (array.shape[0] - px) // 2, (array.shape[1] - px) // 2
    return array[top : top + px, left : left + px]


@settings(max_examples=80, deadline=None)
@given(height=st.integers(20, 300), width=st.integers(20, 300), px=st.sampled_from([8, 16, 32, 64, 100]))
def test_center_crop_equals_guided_diffusions(height: int, width: int, px: int) -> None:
    image = draw_oblong(height, width)
    assert_array_equal(resize_image(image, recipe(px, px)), center_crop_restated(image, px))


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (1280, 720), (100, 900), (33, 35), (128, 256)])
def test_center_crop_to_an_oblong_keeps_aspect_and_middle(height: int, width: int) -> None:
    """A picture whose red is its row and green its column shows where each output pixel came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.dstack([rows * 255 // (height - 1), columns * 255 // (width - 1), rows * 0]).astype(np.uint8)
    out = resize_image(image, recipe(64, 128)).astype(float)
    assert out.shape == (64, 128, 3)
    scale = max(64 / height, 128 / width)
    centre = ((np.arange(64) - 31.5) / scale + (height - 1) / 2) / (height - 1) * 255
    across = ((np.arange(128) - 63.5) / scale + (width - 1) / 2) / (width - 1) * 255
    slack = 3 + 255 / scale / min(height, width)  # rounding of colours, and of the crop by under one output px
    assert np.abs(out[:, :, 0] - centre[:, None]).max() <= slack
    assert np.abs(out[:, :, 1] - across[None, :]).max() <= slack


@pytest.mark.parametrize(("height", "width"), [(1, 100_000), (100_000, 1), (3, 50_000), (40, 60_000)])
def test_extreme_strips_neither_explode_nor_shift(height: int, width: int) -> None:
    ramp = np.linspace(0, 255, max(height, width)).astype(np.uint8)
    image = np.repeat(
        np.broadcast_to(ramp if width > height else ramp[:, None], (height, width))[:, :, None], 3, axis=2
    )
    out = resize_image(np.ascontiguousarray(image), recipe(64, 64))
    assert out.shape == (64, 64, 3)
    assert np.abs(out.astype(int) - 127).max() <= 2  # the middle of the ramp


def test_strip_equals_the_long_way_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    image = draw_oblong(16, 900)
    expected = center_crop_restated(image, 32)
    monkeypatch.setattr("dtpipe.extract.sources.images._MAX_OVERHANG", 4)
    assert np.abs(resize_image(image, recipe(32, 32)).astype(int) - expected).max() <= 1
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    assert np.abs(resize_image(tall, recipe(32, 32)).astype(int) - center_crop_restated(tall, 32)).max() <= 1


@pytest.mark.parametrize("name", ["box", "bilinear", "bicubic", "lanczos"])
def test_stretch_is_one_antialiased_resize(name: str) -> None:
    image = draw_oblong(90, 160)
    expected = Image.fromarray(image).resize((64, 32), Image.Resampling[name.upper()])
    assert_array_equal(resize_image(image, recipe(32, 64, resize="stretch", filter=name)), np.asarray(expected))


def test_without_antialias_bilinear_equals_torch() -> None:
    image = draw_oblong(90, 161)
    out = resize_image(image, recipe(32, 50, resize="stretch", filter="bilinear", antialias=False))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(tensor, (32, 50), mode="bilinear", align_corners=False, antialias=False)
    assert np.abs(out - expected[0].permute(1, 2, 0).numpy()).max() <= 0.501  # rounding to 8 bits


def test_without_antialias_box_takes_the_nearest_pixel() -> None:
    image = draw_oblong(90, 161)
    out = resize_image(image, recipe(30, 23, resize="stretch", filter="box", antialias=False))
    assert_array_equal(out, image[1::3, 3::7])  # 90/30 = 3, 161/23 = 7: the middle of each cell


@pytest.mark.parametrize("name", ["bicubic", "lanczos"])
def test_without_antialias_enlarging_equals_pillow(name: str) -> None:
    """Enlarging, a filter has its own width in both; Pillow renormalises at the border where we repeat it."""
    image = draw_oblong(20, 30)
    out = resize_image(image, recipe(50, 75, resize="stretch", filter=name, antialias=False)).astype(int)
    expected = np.asarray(Image.fromarray(image).resize((75, 50), Image.Resampling[name.upper()])).astype(int)
    assert np.abs(out - expected)[8:-8, 8:-8].max() <= 2  # Pillow rounds between its two passes


def test_antialias_matters() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    smooth = resize_image(stripes, recipe(16, 16, resize="center_crop"))
    rough = resize_image(stripes, recipe(16, 16, resize="center_crop", filter="box", antialias=False))
    assert np.abs(smooth.astype(int) - 127).max() <= 1
    assert set(np.unique(rough)) <= {0, 255}


def test_none_takes_only_the_right_size() -> None:
    image = draw_oblong(24, 40)
    assert_array_equal(resize_image(image, recipe(24, 40, resize="none")), image)
    with pytest.raises(BadImage, match="40x24 px, and resize=none takes only 24x24"):
        resize_image(image, recipe(24, 24, resize="none"))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize=st.sampled_from(["center_crop", "stretch"]),
    name=st.sampled_from(["box", "bilinear", "bicubic", "lanczos"]),
    antialias=st.booleans(),
)
def test_any_size_gives_the_size_asked_for_and_flat_stays_flat(
    height: int, width: int, target: tuple[int, int], resize: str, name: str, antialias: bool
) -> None:
    flat = np.full((height, width, 3), (10, 200, 77), np.uint8)
    out = resize_image(flat, recipe(*target, resize=resize, filter=name, antialias=antialias))
    assert_array_equal(out, np.full((*target, 3), (10, 200, 77), np.uint8))
    assert out.dtype == np.uint8
