"""Any file decodes as it is meant to be looked at, or is a BadImage with one line."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image, ImageCms, ImageSequence

from dtpipe.extract.sources.images import decode_image
from dtpipe.manifests.errors import BadImage
from parts.images import draw_oblong

LIMIT = 128_000_000


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
    upright = draw_oblong()
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
    assert_array_equal(decode(saved(Image.fromarray(draw_oblong()), exif=exif.tobytes())), draw_oblong())


def test_broken_exif_does_not_spoil_the_pixels() -> None:
    data = saved(Image.fromarray(draw_oblong()), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert_array_equal(decode(data), draw_oblong())


# --- modes -----------------------------------------------------------------------------------------------------------


def test_plain_rgb_is_untouched() -> None:
    assert_array_equal(decode(saved(Image.fromarray(draw_oblong()))), draw_oblong())


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
    image = Image.fromarray(draw_oblong())
    grey = np.asarray(image.convert("L"))
    assert_array_equal(decode(saved(image.convert("L"))), np.repeat(grey[:, :, None], 3, 2))
    paletted = image.quantize(16)
    assert_array_equal(decode(saved(paletted)), np.asarray(paletted.convert("RGB")))
    bits = grey > 128
    assert_array_equal(decode(saved(Image.fromarray(bits)))[..., 0], np.where(bits, 255, 0))


def test_alpha_is_dropped_and_the_colour_below_kept() -> None:
    rgba = np.dstack([draw_oblong(), np.arange(24 * 40, dtype=np.uint16).reshape(24, 40).astype(np.uint8)])
    for form in "PNG", "TIFF":
        assert_array_equal(decode(saved(Image.fromarray(rgba), form)), draw_oblong())
    la = np.dstack([draw_oblong()[..., 0], rgba[..., 3]])
    assert_array_equal(decode(saved(Image.frombytes("LA", (40, 24), la.tobytes())))[..., 2], la[..., 0])


def test_palette_with_transparency_keeps_its_colours() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    image.putdata([0, 1, 2, 3])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]]
    assert decode(saved(image, transparency=1))[0].tolist() == colours
    assert decode(saved(image, transparency=b"\x00\x80\xff\x10"))[0].tolist() == colours  # Pillow warns about this one


def test_cmyk_follows_the_ink_formula() -> None:
    inks = np.dstack([draw_oblong(idx=1), draw_oblong(idx=2)[..., 0]])
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
    decoded = decode(saved(Image.fromarray(draw_oblong(32, 32)), form, **options))
    assert np.abs(decoded.astype(int) - draw_oblong(32, 32)).max() <= (8 if form == "AVIF" else 0)


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
    assert "truncated" in reason(saved(Image.fromarray(draw_oblong(200, 200)), "JPEG")[:-600])
    assert "truncated" in reason(saved(Image.fromarray(draw_oblong(200, 200)), "PNG")[:-600])


def test_reasons_are_equal_on_every_run() -> None:
    for data in b"", b"hello", b"\x89PNG\r\n\x1a\n", png_of(0, 5), png_of(50, 50):
        assert reason(data) == reason(data)


@pytest.mark.parametrize("side", [20_000, 100_000, 2**31 - 1])
def test_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    data = png_of(side, side)
    assert f"{side * side} pixels" in reason(data)
    assert str(LIMIT) in reason(data)


def test_limit_is_inclusive() -> None:
    data = saved(Image.fromarray(draw_oblong(24, 40)))
    assert decode_image(data, 24 * 40).shape == (24, 40, 3)
    assert "960 pixels (40x24)" in reason(data, 24 * 40 - 1)


def test_limit_above_pillows_own_is_honoured_and_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow by itself refuses above 800
    data = saved(Image.fromarray(draw_oblong(24, 40)))
    assert decode_image(data, 1000).shape == (24, 40, 3)
    assert "960 pixels" in reason(data, 900)
    assert Image.MAX_IMAGE_PIXELS == 500
    assert decode_image(data, 960).shape == (24, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_icon_that_holds_more_than_it_announces_is_measured_again() -> None:
    icon = bytearray(saved(Image.fromarray(draw_oblong(128, 128)), "ICO", sizes=[(128, 128)]))
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
    original = saved(Image.fromarray(draw_oblong(16, 16)), form)
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
    data = bytearray(saved(Image.fromarray(draw_oblong(64, 64)), "TIFF", compression="tiff_adobe_deflate"))
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
    good, filters = saved(Image.fromarray(draw_oblong(64, 64)), "JPEG"), len(warnings.filters)
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
