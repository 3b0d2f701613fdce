"""Files made to fill memory stay within the stated limits, and say what they are; peaks are those of the process.

Each file would take several times its bound if it were believed.
"""

from __future__ import annotations

import random
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dtpipe.extract.sources.images import PEAK_BYTES_PER_PIXEL
from dtpipe.extract.sources.names import MAX_FILE_BYTES
from parts.images import draw_image
from parts.packing import write_zip
from parts.peak import Peak, peaks

MB = 10**6
SLACK_BYTES = 4 * MB  # what libraries take when they are first used
PIXELS = 1200 * 1200
SMOOTH = Image.fromarray(draw_image(0, 1200))
GREY = np.asarray(SMOOTH)[..., 0]
TURNED = Image.Exif()
TURNED[0x0112] = 6

SETUP = """
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.parquet import bounded
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.schema import TransformRecipe
from parts.images import draw_image, png

recipe = TransformRecipe(resize="center_crop", height=64, width=64)
decode_image(png(draw_image(0)), 10**6)

def decode(path, max_pixels=10**7):
    with open(path, "rb") as file:
        return resize_image(decode_image(file.read(), max_pixels), recipe).shape

def read(path):
    source = open_source(path)
    return [len(source.read(item.uri)) for item in source.list()]

def read_group(path, limit):
    bounded.MAX_GROUP_BYTES, bounded._BATCH_BYTES = limit, limit // 4
    return read(path)

def listed(path):
    source = open_source(path)
    return source.list()[-1].key, {item.label for item in source.list()}, source.ignored()
"""

FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rgb.png": (SMOOTH, {}),
    "turned.png": (SMOOTH, {"exif": TURNED}),
    "alpha.png": (SMOOTH.convert("RGBA"), {}),
    "deep.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}),
    "float.tif": (Image.fromarray(GREY.astype(np.float32)), {}),
    "strip.tif": (SMOOTH, {"compression": "tiff_lzw", "tiffinfo": {278: 1200}}),
    "ink.tif": (SMOOTH.convert("CMYK"), {}),
    "progressive.jpg": (SMOOTH, {"progressive": True, "subsampling": 0, "exif": TURNED}),
    "a.gif": (SMOOTH, {}),
    "lossy.webp": (SMOOTH, {}),
    "lossless.webp": (SMOOTH, {"lossless": True, "method": 0}),
    "a.jp2": (SMOOTH, {}),
    "a.avif": (SMOOTH, {"speed": 10}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


def test_decoding_any_format_takes_no_more_than_is_stated_for_a_pixel(root: Path) -> None:
    for name, (image, options) in FORMATS.items():
        image.save(root / name, **options)
    measured = peaks(SETUP, {name: f"decode({str(root / name)!r})" for name in FORMATS})
    assert {name: peak.answer for name, peak in measured.items()} == dict.fromkeys(FORMATS, "(64, 64, 3)")
    bounds = {name: PEAK_BYTES_PER_PIXEL * PIXELS + (root / name).stat().st_size + SLACK_BYTES for name in FORMATS}
    assert {name: peak for name, peak in measured.items() if peak.size_bytes > bounds[name]} == {}
    assert measured["rgb.png"].size_bytes > 7 * PIXELS  # the measure sees what C libraries take


# --- files made to fill memory ---------------------------------------------------------------------------------------


def png_of_zeros(side: int) -> bytes:
    """A black grey PNG, side x side, without ever holding it."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    body = b""
    for name, part in chunks:
        body += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return b"\x89PNG\r\n\x1a\n" + body


def icon_of(picture: bytes) -> bytes:
    """An icon whose directory says that the picture has 16 px."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def tiff_of_one_tile(side: int) -> bytes:
    """8 px, in the corner of a tile of side x side black pixels."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(side)) for _ in range(side)) + packer.flush()
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 0, 325: len(data)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + data


def tar_of(path: Path, *members: tuple[bytes, int]) -> None:
    """A tar of members of a type and a claimed size; the file is as long as they say, and holds nothing."""
    with path.open("wb") as file:
        for kind, size in members:
            member = tarfile.TarInfo("x.png")
            member.type, member.size = kind, size
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            if kind == tarfile.REGTYPE:
                file.seek(-(-size // 512) * 512, 1)
        file.truncate(max(file.tell(), 10**9) + 1024)


def write_bombs(root: Path) -> None:
    (root / "wide.png").write_bytes(png_of_zeros(6_000))
    (root / "icon.ico").write_bytes(icon_of(png_of_zeros(6_000)))
    (root / "tile.tif").write_bytes(tiff_of_one_tile(6_000))
    (root / "long").mkdir()
    with (root / "long" / "long.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    write_zip(root / "bomb.zip", {"x.png": bytes(2**26 + 1)})
    tar_of(root / "member.tar", (tarfile.REGTYPE, MAX_FILE_BYTES + 1))
    tar_of(root / "header.tar", (tarfile.XHDTYPE, 10**9))
    tar_of(root / "name.tar", (tarfile.GNUTYPE_LONGNAME, 10**9))
    big = random.Random(0).randbytes(2**15)
    rows = {"image": pa.array([big] * 2000, pa.binary())}
    pq.write_table(pa.table(rows), root / "repeated.parquet", dictionary_pagesize_limit=2**24)
    small = {"image": [b"x"] * 1000, "label": [big.hex()] * 1000}
    pq.write_table(pa.table(small), root / "labels.parquet", dictionary_pagesize_limit=2**24)
    pq.write_table(pa.table({"image": [bytes(2**26 + 1)]}), root / "zeros.parquet", compression="zstd")
    pq.write_table(pa.table({"image": pa.nulls(10**6, pa.binary())}), root / "nulls.parquet")


BOMBS: dict[str, tuple[str, float, str]] = {  # the call, most bytes, the answer
    "wide.png": ("decode({0!r}, 10**6)", 0, "BadImage: 36000000 pixels (6000x6000) are more than the limit of 1000000"),
    "icon.ico": ("decode({0!r}, 10**6)", 0, "BadImage: 36000000 pixels (6000x6000) are more than the limit of 1000000"),
    "tile.tif": ("decode({0!r}, 10**6)", 0, "BadImage: tiles of 36000000 pixels are more than the limit of 1000000"),
    "long": ("read({0!r})", 0, "BadImage: file of 536870913 bytes is over the limit of 536870912"),
    "bomb.zip": ("read({0!r})", 0, "BadImage: unpacks to 67108865 bytes from "),
    "member.tar": ("read({0!r})", 0, "BadImage: file of 536870913 bytes is over the limit of 536870912"),
    "header.tar": ("read({0!r})", 0, "InputError: {0}: damaged or cut off at byte 0 (a header of over 4194304 bytes)"),
    "name.tar": ("read({0!r})", 0, "InputError: {0}: damaged or cut off at byte 0 (a header of over 4194304 bytes)"),
    "repeated.parquet": (
        "read_group({0!r}, 2**22)",
        4 * 2**22,
        "BadImage: its row group, 0, unpacks to more than the limit of 4194304 bytes",
    ),
    "labels.parquet": (
        "listed({0!r})",
        0,
        "('labels.parquet#999', {{None}}, {{'labels of the column of labels that are over 1000 characters': 1000}})",
    ),
    "zeros.parquet": ("read({0!r})", 0, "InputError: {0}: row group 0 unpacks to "),
    "nulls.parquet": ("read({0!r})", 0, "InputError: {0}: claims 1000000 rows in "),
}


@pytest.fixture(scope="module")
def measured(root: Path) -> Iterator[dict[str, Peak]]:
    """Of each bomb; they go at once, since they are long, if mostly of holes."""
    folder = root / "bombs"
    folder.mkdir()
    write_bombs(folder)
    measured = peaks(SETUP, {name: call.format(str(folder / name)) for name, (call, _, _) in BOMBS.items()})
    for path in (*folder.glob("*.tar"), *folder.glob("long/*")):
        path.unlink()
    yield measured


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_named_and_takes_no_more_than_its_bound(name: str, root: Path, measured: dict[str, Peak]) -> None:
    _, bound, said = BOMBS[name]
    assert measured[name].answer.startswith(said.format(str(root / "bombs" / name)))
    assert measured[name].size_bytes < bound + 5 * SLACK_BYTES


def test_icon_and_tiles_within_the_limit_are_read(root: Path) -> None:
    (root / "a.ico").write_bytes(icon_of(png_of_zeros(64)))
    (root / "b.tif").write_bytes(tiff_of_one_tile(64))
    answers = peaks(SETUP, {name: f"decode({str(root / name)!r})" for name in ("a.ico", "b.tif")})
    assert {peak.answer for peak in answers.values()} == {"(64, 64, 3)"}
