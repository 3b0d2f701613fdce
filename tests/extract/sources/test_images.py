"""Any file decodes as it is meant to be looked at, or is a BadImage with one line; resizing matches its sources."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image, ImageCms, ImageSequence

from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.manifests.errors import BadImage
from dtpipe.manifests.schema import TransformRecipe

LIMIT = 128_000_000


def picture(height: int = 24, width: int = 40, idx: int = 0) -> np.ndarray:
    """A smooth random picture without any symmetry, uint8 [height, width, 3]."""
    rng = np.random.Generator(np.random.Philox(idx))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    return decode_image(data, LIMIT)


def reason(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data, max_pixels)
    text = caught.value.reason
    assert text and text.isprintable() and len(text) <= 200 and " at 0x" not in text
    return text


# --- orientation -----------------------------------------------------------------------------------------------------


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera held in each way stores, by the EXIF table: where row 0 and column 0 lie in the scene."""
    return {
        1: upright,
        2: upright[:, ::-1],  # row 0 top, column 0 right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # row 0 left, column 0 top
        6: upright.transpose(1, 0, 2)[::-1],  # row 0 right, column 0 top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[orientation]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int, form: str) -> None:
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    stored = Image.fromarray(np.ascontiguousarray(as_stored(upright, orientation)))
    decoded = decode(saved(stored, form, exif=exif.tobytes(), **options))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= (6 if form == "JPEG" else 0)  # JPEG is lossy


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_impossible_orientation_is_none(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_array_equal(decode(saved(Image.fromarray(picture()), exif=exif.tobytes())), picture())


def test_broken_exif_does_not_spoil_the_pixels() -> None:
    data = saved(Image.fromarray(picture()), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert_array_equal(decode(data), picture())


# --- modes -----------------------------------------------------------------------------------------------------------


def test_plain_rgb_is_untouched() -> None:
    assert_array_equal(decode(saved(Image.fromarray(picture()))), picture())


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_by_its_type_and_rounded(form: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = decode(saved(Image.fromarray(values), form))
    expected = np.floor(values / 65535.0 * 255.0 + 0.5).astype(np.uint8)
    assert_array_equal(grey, np.repeat(expected[:, :, None], 3, axis=2))


def test_16_bit_big_endian_equals_little_endian() -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16
    little, big = (
        saved(Image.fromarray(values), "TIFF"),
        saved(Image.frombytes("I;16B", (64, 64), values.astype(">u2").tobytes()), "TIFF"),
    )
    assert little[:2] == b"II" and big[:2] == b"MM"
    assert_array_equal(decode(little), decode(big))


def test_white_is_zero_is_inverted() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    data = saved(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert_array_equal(decode(data)[..., 0], 255 - np.rint(values / 257).astype(np.uint8))


def test_ppm_with_small_maxval_uses_its_whole_range() -> None:
    data = b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes()
    assert decode(data)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 1.0], [0, 64, 255]),  # 0..1
        ([0.0, 100.0, 200.0], [0, 100, 200]),  # 0..255
        ([0.0, 257.0, 65535.0], [0, 1, 255]),  # 0..65535
        ([-1.0, 0.0, 1.0], [0, 128, 255]),  # its own range
        ([0.0, 500_000.0, 1_000_000.0], [0, 128, 255]),
        ([-3.0, -3.0, -3.0], [0, 0, 0]),
    ],
)
def test_float_grey_is_shown_over_its_nominal_range(values: list[float], expected: list[int]) -> None:
    data = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert decode(data)[0, :, 1].tolist() == expected


def test_32_bit_integers_are_shown_over_their_nominal_range() -> None:
    for values, expected in ([0, 7, 255], [0, 7, 255]), ([0, 256, 65535], [0, 1, 255]), ([-100, 0, 100], [0, 128, 255]):
        assert decode(saved(Image.fromarray(np.array([values], np.int32)), "TIFF"))[0, :, 2].tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_bad(bad: float) -> None:
    assert "finite" in reason(saved(Image.fromarray(np.array([[0.0, bad]], np.float32)), "TIFF"))


def test_grey_palette_and_1_bit_become_rgb() -> None:
    image = Image.fromarray(picture())
    grey = np.asarray(image.convert("L"))
    assert_array_equal(decode(saved(image.convert("L"))), np.repeat(grey[:, :, None], 3, 2))
    paletted = image.quantize(16)
    assert_array_equal(decode(saved(paletted)), np.asarray(paletted.convert("RGB")))
    bits = grey > 128
    assert_array_equal(decode(saved(Image.fromarray(bits)))[..., 0], np.where(bits, 255, 0))


def test_alpha_is_dropped_and_the_colour_below_kept() -> None:
    rgba = np.dstack([picture(), np.arange(24 * 40, dtype=np.uint16).reshape(24, 40).astype(np.uint8)])
    for form in "PNG", "TIFF":
        assert_array_equal(decode(saved(Image.fromarray(rgba), form)), picture())
    la = np.dstack([picture()[..., 0], rgba[..., 3]])
    assert_array_equal(decode(saved(Image.frombytes("LA", (40, 24), la.tobytes())))[..., 2], la[..., 0])


def test_palette_with_transparency_keeps_its_colours() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    image.putdata([0, 1, 2, 3])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]]
    assert decode(saved(image, transparency=1))[0].tolist() == colours
    assert decode(saved(image, transparency=b"\x00\x80\xff\x10"))[0].tolist() == colours  # Pillow warns about this one


def test_cmyk_follows_the_ink_formula() -> None:
    inks = np.dstack([picture(idx=1), picture(idx=2)[..., 0]])
    decoded = decode(saved(Image.frombytes("CMYK", (40, 24), inks.tobytes()), "TIFF"))
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    assert np.abs(decoded - expected).max() <= 1.01  # Pillow rounds in integers


def test_cmyk_jpeg_of_adobe_is_not_a_negative() -> None:
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    decoded = decode(saved(inks, "JPEG", quality=95)).reshape(-1, 3).mean(0)
    assert decoded[0] > 245 and decoded[1:].max() < 10


def test_lab_is_converted_by_its_colours() -> None:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    encode = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    image = Image.new("RGB", (8, 8), (200, 60, 30))
    decoded = decode(saved(ImageCms.applyTransform(image, encode), "TIFF"))
    assert np.abs(decoded.astype(int) - [200, 60, 30]).max() <= 4  # 8-bit Lab is coarse


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
    assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000", "QOI", "BMP", "TGA", "WEBP", "ICO", "SGI", "PCX"])
def test_other_formats_are_read(form: str) -> None:
    options = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "WEBP": {"lossless": True}}.get(form, {})
    decoded = decode(saved(Image.fromarray(picture(32, 32)), form, **options))
    assert np.abs(decoded.astype(int) - picture(32, 32)).max() <= (8 if form == "AVIF" else 0)


# --- bad files -------------------------------------------------------------------------------------------------------


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + png_chunk(b"IEND", b"")


def test_reasons_say_what_is_wrong() -> None:
    assert reason(b"") == "empty file"
    assert "no decoder takes this file, which starts with 68 65 6c 6c 6f" in reason(b"hello")
    assert "truncated" in reason(saved(Image.fromarray(picture(200, 200)), "JPEG")[:-600])
    assert "truncated" in reason(saved(Image.fromarray(picture(200, 200)), "PNG")[:-600])


def test_reasons_are_equal_on_every_run() -> None:
    for data in b"", b"hello", b"\x89PNG\r\n\x1a\n", png_of(0, 5), png_of(50, 50):
        assert reason(data) == reason(data)


@pytest.mark.parametrize("side", [20_000, 100_000, 2**31 - 1])
def test_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    data = png_of(side, side)
    assert f"{side * side} pixels" in reason(data)
    assert str(LIMIT) in reason(data)


def test_limit_is_inclusive() -> None:
    data = saved(Image.fromarray(picture(24, 40)))
    assert decode_image(data, 24 * 40).shape == (24, 40, 3)
    assert "960 pixels (40x24)" in reason(data, 24 * 40 - 1)


def test_limit_above_pillows_own_is_honoured_and_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow by itself refuses above 800
    data = saved(Image.fromarray(picture(24, 40)))
    assert decode_image(data, 1000).shape == (24, 40, 3)
    assert "960 pixels" in reason(data, 900)
    assert Image.MAX_IMAGE_PIXELS == 500
    assert decode_image(data, 960).shape == (24, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_icon_that_holds_more_than_it_announces_is_measured_again() -> None:
    icon = bytearray(saved(Image.fromarray(picture(128, 128)), "ICO", sizes=[(128, 128)]))
    assert icon[6:8] == b"\x80\x80"
    icon[6:8] = b"\x10\x10"  # directory says 16x16
    assert "16384 pixels" in reason(bytes(icon), 16 * 16)


def test_postscript_is_never_run() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert "no decoder takes this file" in reason(eps)


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), RecursionError("too deep"), struct.error("odd"), KeyError("x"), ZeroDivisionError()],
)
def test_any_exception_of_a_decoder_is_a_bad_image(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    assert reason(b"data").startswith(type(error).__name__)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    form=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "QOI", "TGA", "ICO", "AVIF"]),
)
def test_damaged_files_decode_or_are_bad_and_nothing_else(data: st.DataObject, form: str) -> None:
    original = saved(Image.fromarray(picture(16, 16)), form)
    damaged = bytearray(original[: data.draw(st.integers(0, len(original)))])
    for place in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=8)) if damaged else []:
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_image(bytes(damaged), 1_000_000)
    except BadImage as err:
        assert err.reason and err.reason.isprintable()
    else:
        assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3


def test_libtiff_does_not_write_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(saved(Image.fromarray(picture(64, 64)), "TIFF", compression="tiff_adobe_deflate"))
    data[20:400] = bytes(380)
    reason(bytes(data))
    assert capfd.readouterr() == ("", "")


# --- warnings and threads --------------------------------------------------------------------------------------------


def warning_file() -> bytes:
    """Pillow warns while it converts this one."""
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 50, 60, 70])
    return saved(image, transparency=b"\x00\x80")


def test_test_file_makes_pillow_warn() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(warning_file())).convert("RGB")
    assert caught


def test_warnings_neither_leak_nor_spoil_a_sample() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(warning_file())[0, 0].tolist() == [50, 60, 70]
    assert not caught


def test_other_modules_still_warn_while_images_decode() -> None:
    decode(warning_file())
    with pytest.raises(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)


def test_many_threads_decode_alike_and_leave_the_warning_filters_alone() -> None:
    good, filters = saved(Image.fromarray(picture(64, 64)), "JPEG"), len(warnings.filters)
    jobs = [
        (good, None),
        (warning_file(), None),
        (png_of(20_000, 20_000), "400000000 pixels"),
        (b"junk", "no decoder"),
    ] * 50
    expected = {data: decode(data).tobytes() for data, bad in jobs if bad is None}
    barrier = threading.Barrier(8)

    def work(part: int) -> int:
        barrier.wait()
        for data, bad in jobs[part::8]:
            if bad is None:
                assert decode(data).tobytes() == expected[data]
            else:
                assert bad in reason(data)
        return len(jobs[part::8])

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == len(jobs)
    assert len(warnings.filters) <= filters + 1


# --- resizing --------------------------------------------------------------------------------------------------------


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
    image = picture(height, width)
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
    image = picture(16, 900)
    expected = center_crop_restated(image, 32)
    monkeypatch.setattr("dtpipe.extract.sources.images._MAX_OVERHANG", 4)
    assert np.abs(resize_image(image, recipe(32, 32)).astype(int) - expected).max() <= 1
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    assert np.abs(resize_image(tall, recipe(32, 32)).astype(int) - center_crop_restated(tall, 32)).max() <= 1


@pytest.mark.parametrize("name", ["box", "bilinear", "bicubic", "lanczos"])
def test_stretch_is_one_antialiased_resize(name: str) -> None:
    image = picture(90, 160)
    expected = Image.fromarray(image).resize((64, 32), Image.Resampling[name.upper()])
    assert_array_equal(resize_image(image, recipe(32, 64, resize="stretch", filter=name)), np.asarray(expected))


def test_without_antialias_bilinear_equals_torch() -> None:
    image = picture(90, 161)
    out = resize_image(image, recipe(32, 50, resize="stretch", filter="bilinear", antialias=False))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(tensor, (32, 50), mode="bilinear", align_corners=False, antialias=False)
    assert np.abs(out - expected[0].permute(1, 2, 0).numpy()).max() <= 0.501  # rounding to 8 bits


def test_without_antialias_box_takes_the_nearest_pixel() -> None:
    image = picture(90, 161)
    out = resize_image(image, recipe(30, 23, resize="stretch", filter="box", antialias=False))
    assert_array_equal(out, image[1::3, 3::7])  # 90/30 = 3, 161/23 = 7: the middle of each cell


@pytest.mark.parametrize("name", ["bicubic", "lanczos"])
def test_without_antialias_enlarging_equals_pillow(name: str) -> None:
    """Enlarging, a filter has its own width in both; Pillow renormalises at the border where we repeat it."""
    image = picture(20, 30)
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
    image = picture(24, 40)
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
