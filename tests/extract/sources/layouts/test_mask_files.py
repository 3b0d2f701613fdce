"""Masks as files: their values are class numbers or they are refused; they stay on their images."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from dtpipe.extract.sources.images import resize_image
from dtpipe.extract.sources.layouts.mask_files import check_shape, decode_mask, resize_mask
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.schema import TransformRecipe
from parts.images import png

VALUES = np.array([[0, 1], [2, 255]], np.uint8)


def file(array: np.ndarray, form: str, mode: str | None = None, **options: object) -> bytes:
    """An image file of an array."""
    buffer, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def palette_file(form: str) -> bytes:
    """The values as indices into a palette of colours that are no greys."""
    image, buffer = Image.fromarray(VALUES), io.BytesIO()
    image.putpalette(bytes(range(255, -1, -1)) * 3)
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("resize", ["center_crop", "stretch"])
@pytest.mark.parametrize("size", [(96, 160), (160, 96), (64, 64), (40, 50)])
def test_a_mask_lies_where_its_image_lies(resize: str, size: tuple[int, int]) -> None:
    """A white disc as image and as mask: resized, they may differ on the disc's rim only."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    disc = (rows - size[0] * 0.4) ** 2 + (columns - size[1] * 0.6) ** 2 < (min(size) * 0.3) ** 2
    recipe = TransformRecipe(resize=resize, height=32, width=32)
    image = resize_image(np.repeat(disc[..., None], 3, axis=2).astype(np.uint8) * 255, recipe)[..., 0]
    mask = resize_mask(disc.astype(np.uint8), recipe)
    assert mask.shape == (32, 32)
    assert 0.1 < mask.mean() < 0.5
    assert ((image > 127) != (mask == 1)).mean() < 0.03


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(VALUES), id="grey"),
        pytest.param(palette_file("PNG"), id="palette"),
        pytest.param(png(np.repeat(VALUES[..., None], 3, axis=2)), id="equal channels"),
        pytest.param(file(VALUES, "PNG", "RGBA"), id="equal channels and alpha"),
        pytest.param(file(VALUES.astype(np.uint16), "PNG"), id="16 bit"),
        pytest.param(file(VALUES.astype(np.int32), "TIFF"), id="32 bit"),
        pytest.param(file(VALUES.astype(np.float32), "TIFF"), id="whole floats"),
        pytest.param(file(VALUES, "TIFF", compression="tiff_lzw"), id="packed TIFF"),
        pytest.param(file(VALUES, "BMP"), id="BMP"),
        pytest.param(file(VALUES, "PPM"), id="PGM"),
    ],
)
def test_mask_values_are_class_numbers_however_they_are_stored(data: bytes) -> None:
    assert_array_equal(decode_mask(data, "a"), VALUES)


def test_a_mask_of_one_bit_has_classes_0_and_1() -> None:
    assert_array_equal(decode_mask(file(VALUES > 1, "PNG"), "a"), [[0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(b"", "cannot be read", id="empty"),
        pytest.param(b"not an image", "cannot be read", id="text"),
        pytest.param(png(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)), "4 colours in 3 channels", id="colours"),
        pytest.param(file(VALUES, "PNG", "LA"), "4 colours in 2 channels", id="grey and alpha"),
        pytest.param(file(VALUES, "JPEG"), "is JPEG, and such files need not keep class numbers", id="JPEG"),
        pytest.param(file(VALUES, "WEBP"), "is WEBP", id="WebP"),
        pytest.param(file(VALUES, "GIF"), "is GIF.*GIF renumbers them", id="GIF"),
        pytest.param(file(VALUES, "TIFF", compression="jpeg"), "is TIFF with jpeg", id="JPEG in a TIFF"),
        pytest.param(file(VALUES.astype(np.uint16) + 1, "PNG"), "1 pixels of other values, 256", id="instances"),
        pytest.param(file(-VALUES.astype(np.int32), "TIFF"), "3 pixels of other values, -1", id="negative"),
        pytest.param(file(VALUES / np.float32(2), "TIFF"), "2 pixels of other values, 0.5", id="shares"),
        pytest.param(file(VALUES + np.float32(np.nan), "TIFF"), "4 pixels of other values, nan", id="NaN"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=rf"mask cat/1\.png .*{said}.*masks are PNG files"):
        decode_mask(data, "cat/1.png")


def test_pixels_of_a_mask_are_counted_before_they_are_decoded() -> None:
    data = png(np.zeros((300, 400), np.uint8))
    assert decode_mask(data, "a", max_pixels=120_000).shape == (300, 400)
    with pytest.raises(
        InputError, match=r"mask a cannot be read: 120000 pixels \(400x300\) are more than the limit of 9"
    ):
        decode_mask(data, "a", max_pixels=9)
    bomb = bytearray(data)  # the header alone says so: 60,000 x 60,000 px
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match=r"3600000000 pixels .*are more than the limit of 128000000"):
        decode_mask(bytes(bomb), "a")


@pytest.mark.parametrize("mask_px", [(427, 640), (214, 320), (213, 320), (854, 1280), (27, 40)])
def test_masks_of_the_images_aspect_fit_at_any_scale(mask_px: tuple[int, int]) -> None:
    check_shape(np.zeros(mask_px, np.uint8), (427, 640), "a")


@pytest.mark.parametrize("mask_px", [(640, 427), (427, 427), (420, 640), (64, 64)])
def test_masks_of_another_aspect_are_refused(mask_px: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"{mask_px[1]}x{mask_px[0]} px and its image.* 640x427"):
        check_shape(np.zeros(mask_px, np.uint8), (427, 640), "a")
