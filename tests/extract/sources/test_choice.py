"""What a folder is follows from which of its files hold images; one stray file decides nothing and hides nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtpipe.extract.sources.choice import ChosenSource
from dtpipe.extract.sources.registry import open_source
from dtpipe.extract.sources.tar import TarSource
from dtpipe.manifests.errors import InputError
from parts.images import draw_image, png, write_files
from parts.packing import contents, write_lmdb, write_parquet, write_tar, write_zip

IMAGE = png(draw_image(0, 8))
FILES = {"cat/0.png": IMAGE, "dog/1.png": IMAGE}
Pack = Callable[[Path, dict[str, bytes]], object]


def write_table(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path)


PACKED: dict[str, tuple[str, Pack]] = {
    "webdataset": ("left_over.tar", write_tar),
    "parquet": ("train.parquet", write_parquet),
    "lmdb": ("data.mdb", lambda path, files: write_lmdb(path, files, subdir=False)),
    "zip": ("photos.zip", write_zip),
}


@pytest.fixture(params=PACKED)
def packed(request: pytest.FixtureRequest) -> tuple[str, str, Pack]:
    """A kind of container, the name of such a file, and how to write one."""
    if request.param == "lmdb":
        pytest.importorskip("lmdb", reason="needs the extra `lmdb`")
    return request.param, *PACKED[request.param]


@pytest.mark.parametrize("place", ["", "dog/"])
def test_images_in_two_kinds_of_files_are_refused_naming_both(
    place: str, packed: tuple[str, str, Pack], tmp_path: Path
) -> None:
    kind, name, write = packed
    write_files(tmp_path, FILES)
    write(tmp_path / place / name, {"x.png": IMAGE})
    itself = place or kind == "zip"
    choice = f"give {place}{name} itself" if itself else f"extract.source.kind={kind}"
    with pytest.raises(InputError) as caught:
        open_source(str(tmp_path))
    said = str(caught.value)
    assert "2 image files (cat/0.png) and 1 " in said
    assert f"{place}{name} holds " in said
    assert f"(extract.source.kind=class_folder or {choice})" in said
    assert contents(open_source(str(tmp_path), "class_folder")) == FILES
    named = open_source(str(tmp_path / place / name)) if itself else open_source(str(tmp_path), kind)
    assert list(contents(named).values()) == [IMAGE]


def test_containers_without_images_are_ignored_and_counted(packed: tuple[str, str, Pack], tmp_path: Path) -> None:
    kind, name, write = packed
    write_files(tmp_path, FILES)
    if kind == "parquet":
        write_table(tmp_path / name, url=["u"], embedding=pa.array([b"\x01\x02"], pa.binary()))
    else:
        write(tmp_path / name, {"a.xml": b"<x/>", "notes/b.txt": b"text"})
    source = open_source(str(tmp_path))
    assert (source.kind, contents(source)) == ("class_folder", FILES)
    assert source.ignored() == {f"{Path(name).suffix} without images": 1}


def test_output_of_img2dataset_is_read_from_its_tars(tmp_path: Path) -> None:
    expected = {}
    for idx in range(5):
        write_tar(tmp_path / f"{idx:05d}.tar", {f"{idx:05d}0000.jpg": IMAGE, f"{idx:05d}0000.json": b"{}"})
        write_table(tmp_path / f"{idx:05d}.parquet", url=["u"], status=["success"])
        (tmp_path / f"{idx:05d}_stats.json").write_text("{}")
        expected[f"{idx:05d}.tar/{idx:05d}0000.jpg"] = IMAGE
    source = open_source(str(tmp_path))
    assert (source.kind, contents(source)) == ("webdataset", expected)
    assert source.ignored() == {".parquet without images (3 looked into)": 5, ".json": 10}


def test_tars_and_parquet_that_both_hold_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": IMAGE})
    write_parquet(tmp_path / "a.parquet", {"0.png": IMAGE})
    with pytest.raises(InputError, match=r"1 \.parquet file .* and 1 \.tar file .*=parquet or .*=webdataset"):
        open_source(str(tmp_path))


def test_only_a_few_of_many_tars_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none where there is nothing else: the listing opens them all anyhow."""
    opened: list[str] = []
    container = open_source(str(write_tar(tmp_path / "x.tar", {"0.png": IMAGE})))
    assert isinstance(container, TarSource)
    place_type = type(container._place)
    plain_open = place_type.open

    def count(self: object, path: str, **options: object) -> object:
        opened.append(Path(path).name)
        return plain_open(self, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(place_type, "open", count)
    for idx in range(20):
        write_tar(tmp_path / "tars" / f"{idx:02d}.tar", {"0.xml": b""})
    assert isinstance(open_source(str(tmp_path / "tars")), TarSource)
    assert opened == []
    write_files(tmp_path / "tars", FILES)
    source = open_source(str(tmp_path / "tars"))
    assert opened == ["00.tar", "10.tar", "19.tar"]
    assert source.ignored() == {".tar without images (3 looked into)": 20}


def test_tar_of_many_annotations_is_looked_into_up_to_a_thousand_members(tmp_path: Path) -> None:
    write_files(tmp_path, FILES)
    names = [f"{idx}.xml" for idx in range(1000)]
    write_tar(tmp_path / "a.tar", dict.fromkeys(names[:-1], b"") | {"last.png": IMAGE})
    with pytest.raises(InputError, match=r"a\.tar holds last\.png"):
        open_source(str(tmp_path))
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"") | {"last.png": IMAGE})
    assert open_source(str(tmp_path)).ignored() == {".tar without images": 1}


def test_what_cannot_be_looked_into_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    """It may hold images, so that leaving it out would be a silent loss."""
    write_files(tmp_path, FILES | {"part.tar": b"\x1f\x8bpacked"})
    with pytest.raises(InputError, match=r"part\.tar lies beside .* by gzip.*move it away, or .*=class_folder or "):
        open_source(str(tmp_path))


def test_manifest_of_something_else_makes_no_feature_dataset(tmp_path: Path) -> None:
    write_files(tmp_path, FILES | {"manifest.json": json.dumps({"name": "My web app", "icons": []}).encode()})
    source = open_source(str(tmp_path))
    assert (source.kind, source.ignored()) == ("class_folder", {".json": 1})


def test_object_stores_choose_as_disks_do(tmp_path: Path, upload: Callable[..., str]) -> None:
    tar = write_tar(tmp_path / "a.tar", {"x.png": IMAGE}).read_bytes()
    other = write_tar(tmp_path / "b.tar", {"x.xml": IMAGE}).read_bytes()
    url = upload(FILES | {"a.tar": tar})
    with pytest.raises(InputError, match=r"2 image files \(cat/0\.png\) and 1 \.tar file \(a\.tar holds x\.png\)"):
        open_source(url)
    url = upload({"a.tar": other})
    source = open_source(url)
    assert isinstance(source, ChosenSource)
    assert (source.kind, contents(source)) == ("class_folder", FILES)


def test_folder_of_containers_without_images_says_what_was_looked_into(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.xml": b""})
    write_table(tmp_path / "a.parquet", url=["u"])
    with pytest.raises(
        InputError, match=r"no image in it \(1 \.parquet without images, 1 \.tar without images\); images are files"
    ):
        open_source(str(tmp_path))
