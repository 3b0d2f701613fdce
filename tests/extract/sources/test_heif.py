"""HEIF is read where its package is installed, and named with what to install where it is not; AVIF always is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtpipe.extract.sources import images, names
from dtpipe.extract.sources.images import decode_image
from dtpipe.extract.sources.names import ignored_text
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, InputError
from parts.images import draw_image, write_files
from parts.packing import write_tar, write_zip
from parts.paths import FIXTURES

HEIC = (FIXTURES / "sources" / "draw_3.heic").read_bytes()
PIXELS = draw_image(3, 32)[:, :24].astype(int)


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if it were not installed: Pillow keeps what it was taught, so our own list of formats lacks it."""
    monkeypatch.setattr(names, "HEIF_PACKAGE", "no_such_package")
    monkeypatch.setattr(images, "_FORMATS", tuple(name for name in images._FORMATS if name != "HEIF"))
    names.reads_heif.cache_clear()
    images._formats.cache_clear()
    yield
    monkeypatch.undo()
    names.reads_heif.cache_clear()
    images._formats.cache_clear()


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "a/b.heif", "c.hif"])
@pytest.mark.parametrize("packed", ["folder", "tar", "zip"])
def test_heif_is_read(name: str, packed: str, tmp_path: Path) -> None:
    pytest.importorskip("pi_heif", reason="needs the extra `heic`")
    write = {"folder": write_files, "tar": write_tar, "zip": write_zip}[packed]
    source = open_source(str(write(tmp_path / f"a.{packed}", {name: HEIC})))
    (item,) = source.list()
    pixels = decode_image(source.read(item.uri), 10**6)
    assert (
        np.abs(pixels - PIXELS).mean() < 8
    )  # of 255; colours are kept at half the size. Another picture is over 70 away
    assert source.ignored() == {}


def test_heif_has_the_limits_of_any_image() -> None:
    pytest.importorskip("pi_heif", reason="needs the extra `heic`")
    with pytest.raises(BadImage, match=r"768 pixels .* more than the limit of 767"):
        decode_image(HEIC, 767)
    for end in (40, 300, len(HEIC) - 1):
        with pytest.raises(BadImage):
            decode_image(HEIC[:end], 10**6)


@pytest.mark.usefixtures("without_package")
def test_without_the_package_heif_is_ignored_and_the_sentence_says_what_to_install(tmp_path: Path) -> None:
    write_files(tmp_path, {f"IMG_{idx}.HEIC": HEIC for idx in range(6)})
    with pytest.raises(
        InputError, match=r"no image in it \(6 \.heic \(`pip install 'dtpipe\[heic\]'` reads \.heic\)\)"
    ):
        open_source(str(tmp_path))
    Image.fromarray(draw_image(1)).save(tmp_path / "a.png")
    (tmp_path / "b.heif").write_bytes(HEIC)
    ignored = open_source(str(tmp_path)).ignored()
    advice = "`pip install 'dtpipe[heic]'` reads .heic and .heif"
    assert ignored_text(ignored) == f"6 .heic, 1 .heif ({advice})"


@pytest.mark.usefixtures("without_package")
def test_heif_under_the_name_of_a_jpeg_is_a_bad_sample_that_says_what_it_is() -> None:
    """As phones and chat programs save it."""
    with pytest.raises(BadImage, match=r"HEIF; `pip install 'dtpipe\[heic\]'` reads it"):
        decode_image(HEIC, 10**6)


@pytest.mark.usefixtures("without_package")
def test_avif_needs_no_extra() -> None:
    file = io.BytesIO()
    Image.fromarray(draw_image(3)).save(file, "AVIF", quality=95)
    assert np.abs(decode_image(file.getvalue(), 10**6) - draw_image(3).astype(int)).mean() < 3
