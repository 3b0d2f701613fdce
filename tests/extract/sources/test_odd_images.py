"""130 unusual and broken files from the test suites of image libraries: each is right, or bad with a reason.

`LIST.tsv` beside them says what Pillow did with each, at a limit of 128,000,000 pixels.
"""

from __future__ import annotations

import csv
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage
from dtpipe.manifests.schema import TransformRecipe
from parts.paths import SHARED

FOLDER = SHARED / "data" / "odd_images"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "LIST.tsv").is_file(), reason="the odd images are not beside this checkout"
)

LIMIT = 128_000_000
STRICTER = {"broken_data_stream.png"}  # the list has it as readable; Pillow 11.3 and later stop at its broken stream
SEEN_BADNESS = {
    "bmp__b__badbitcount.bmp": "pixel depth",
    "bmp__b__badwidth.bmp": "274877898816 pixels are more than the limit of 128000000",
    "bmp__b__reallybig.bmp": "6000000000000 pixels are more than the limit",
    "broken.png": "no decoder takes this file",
    "broken_data_stream.png": "data stream",
    "decompression_bomb.gif": "4364696535 pixels are more than the limit",
    "decompression_bomb.ico": "4294836225 pixels are more than the limit",
    "l2rgb_read.bmp": "151587072 pixels (3158064x48) are more than the limit",
    "truncated_image.png": "truncated",
    "truncated_jpeg.jpg": "truncated",
    "zero_width.gif": "no decoder takes this file",
}


def decode(name: str) -> np.ndarray:
    return decode_image((FOLDER / name).read_bytes(), LIMIT)


def outcome(name: str) -> np.ndarray | str:
    try:
        return decode(name)
    except BadImage as err:
        return err.reason


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, str]]:
    with (FOLDER / "LIST.tsv").open(newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}


@pytest.fixture(scope="module")
def outcomes(listed: dict[str, dict[str, str]]) -> dict[str, np.ndarray | str]:
    """All files, decoded by four threads at once, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(4) as pool:
            return dict(zip(listed, pool.map(outcome, listed), strict=True))


def test_every_file_is_a_sample(listed: dict[str, dict[str, str]]) -> None:
    source = open_source(str(FOLDER))
    assert {item.key for item in source.list()} == set(listed)
    assert source.kind == "folder"
    assert source.ignored() == {".tsv": 1}


def test_files_are_good_or_bad_as_listed(
    listed: dict[str, dict[str, str]], outcomes: dict[str, np.ndarray | str]
) -> None:
    bad = {name for name, found in outcomes.items() if isinstance(found, str)}
    assert bad == {name for name, row in listed.items() if row["pillow_result"] != "ok"} | STRICTER


def test_good_files_have_the_listed_size_once_turned(
    listed: dict[str, dict[str, str]], outcomes: dict[str, np.ndarray | str]
) -> None:
    for name, found in outcomes.items():
        if isinstance(found, str):
            continue
        width, height = map(int, listed[name]["size"].split("x"))
        lies = (
            listed[name]["orientation"] in "5678" and listed[name]["format"] != "TIFF"
        )  # of TIFFs the list has the turned size
        assert found.shape == ((width, height, 3) if lies else (height, width, 3)), name
        assert found.dtype == np.uint8


def test_bad_files_have_one_line_reasons(outcomes: dict[str, np.ndarray | str]) -> None:
    for name, found in outcomes.items():
        if isinstance(found, str):
            assert found.isprintable() and 5 < len(found) <= 200 and not re.search("0x[0-9a-f]{6}|BytesIO", found), name
            assert SEEN_BADNESS.get(name, "") in found, name


def test_outcome_does_not_depend_on_threads(outcomes: dict[str, np.ndarray | str]) -> None:
    for name, found in outcomes.items():
        again = outcome(name)
        assert np.array_equal(again, found) if isinstance(found, np.ndarray) else again == found, name


def test_good_files_resize(outcomes: dict[str, np.ndarray | str]) -> None:
    recipe = TransformRecipe(height=64, width=64)
    for name, found in outcomes.items():
        if isinstance(found, np.ndarray):
            assert resize_image(found, recipe).shape == (64, 64, 3), name


# --- right pixels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["exifrot_Portrait_", "exifrot_Landscape_"])
def test_photographs_of_all_orientations_agree(group: str, outcomes: dict[str, np.ndarray | str]) -> None:
    """They show one scene with the orientation's digit painted on it; unturned they would differ by far more."""
    small = {
        name: np.array(Image.fromarray(found).resize((60, 60))).astype(int)
        for name, found in outcomes.items()
        if name.startswith(group)
    }
    reference = small.get("exifrot_Portrait_1.jpg", next(iter(small.values())))
    assert len(small) >= 4
    for name, found in small.items():
        assert np.abs(found - reference).mean() < 2, name
        for wrong in (found[::-1], found[:, ::-1], found[::-1, ::-1], found.transpose(1, 0, 2)):
            assert np.abs(wrong - reference).mean() > 10, name


def test_portraits_agree_with_the_unturned_file(outcomes: dict[str, np.ndarray | str]) -> None:
    with Image.open(FOLDER / "exifrot_Portrait_1.jpg") as raw:  # orientation 1: stored upright
        assert np.array_equal(np.asarray(raw.convert("RGB")), outcomes["exifrot_Portrait_1.jpg"])


def test_hoppers_of_all_orientations_agree(outcomes: dict[str, np.ndarray | str]) -> None:
    reference = np.asarray(outcomes["hopper.tif"]).astype(int)
    names = [name for name in outcomes if name.startswith("hopper_orientation_")]
    assert len(names) == 9
    for name in names:
        assert np.abs(np.asarray(outcomes[name]) - reference).mean() < 6, name  # lossy files


def test_tiffs_are_turned_once(outcomes: dict[str, np.ndarray | str]) -> None:
    upright = np.asarray(outcomes["g4_orientation_3.tif"])
    for name in "g4_orientation_6.tif", "g4_orientation_8.tif":
        found = np.asarray(outcomes[name])
        assert (found != upright).mean() < 0.01, name  # the files themselves differ in a few pixels
        assert (found[::-1, ::-1] != upright).mean() > 0.1, name
    ink = upright[..., 0] < 128
    assert ink[:, :300].sum() > ink[:, -300:].sum()  # "This is a test file" starts at the left


@pytest.mark.parametrize(
    ("name", "bits"),
    [("16bit.cropped.tif", 16), ("16bit.MM.cropped.tif", 16), ("16_bit_binary.pgm", 16), ("i_trns.png", 16)],
)
def test_16_bit_grey_is_scaled_not_clipped(name: str, bits: int, outcomes: dict[str, np.ndarray | str]) -> None:
    with Image.open(FOLDER / name) as image:
        values = np.asarray(image).astype(np.int64)
    expected = (values * 255 * 2 + 2**bits - 1) // (2 * (2**bits - 1))  # rounded, in integers
    assert values.max() >= 255
    assert np.array_equal(np.asarray(outcomes[name]), np.repeat(expected[:, :, None], 3, axis=2))


def test_same_scene_in_other_formats_agrees(outcomes: dict[str, np.ndarray | str]) -> None:
    exact = [
        ("16bit.MM.cropped.tif", "16bit.cropped.tif"),
        ("16bit.MM.deflate.tif", "16bit.cropped.tif"),
        ("16bit.r.tif", "16bit.cropped.tif"),
        ("hopper.qoi", "hopper.tif"),
        ("bmp__q__rgb32fakealpha.bmp", "bmp__g__rgb32.bmp"),
        ("tiff_tiled_planar_16bit_RGBa.tiff", "tiff_strip_planar_16bit_RGBa.tiff"),
        ("tiff_16bit_RGBa.tiff", "tiff_16bit_RGBa_target.png"),
        ("tiff_gray_2_4_bpp__hopper4R.tif", "tiff_gray_2_4_bpp__hopper4.tif"),
        ("tiff_gray_2_4_bpp__hopper4IR.tif", "tiff_gray_2_4_bpp__hopper4.tif"),
        ("exif_text.png", "exif.png"),
    ]
    for name, other in exact:
        assert np.array_equal(outcomes[name], outcomes[other]), name


def test_colours_of_special_modes(outcomes: dict[str, np.ndarray | str]) -> None:
    cmyk = np.asarray(outcomes["tiff_strip_cmyk_jpeg.tif"]).astype(int)  # the word RED in red on black
    red = cmyk[cmyk[..., 0] > 128]
    assert len(red) > 500 and red[:, 0].mean() > 200 and red[:, 1:].mean() < 60
    assert np.asarray(outcomes["apng__dispose_op_none.png"])[0, 0].tolist() == [255, 0, 0]  # first frame
    avif = np.asarray(outcomes["avif__rot3mir0.avif"]).astype(int)
    assert avif[:60, ..., 2].mean() > avif[-60:, ..., 2].mean() + 60  # sky above, grass below
