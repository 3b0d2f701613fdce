"""Files below a root are the same in a folder, behind a URL, in a zip, in a folder of a zip and in a tar."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import pytest

from dtpipe.extract.sources.layouts.files import Tree
from dtpipe.manifests.errors import InputError
from parts.images import draw_image, png, write_files
from parts.packing import write_tar, write_zip

FILES = {
    "images/train/a.png": png(draw_image(0)),
    "images/train/deep/b.jpg": b"no image",
    "images/val/c.png": png(draw_image(1)),
    "labels.json": b"{}",
    "notes/.hidden/x.txt": b"",
    "notes/read.txt": b"text",
}


@pytest.fixture(params=["folder", "memory", "zip", "zip folder", "tar"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The files as each kind of root."""
    inside = {f"data/{name}": content for name, content in FILES.items()}
    match request.param:
        case "folder":
            return str(write_files(tmp_path / "data", FILES))
        case "memory":
            return str(request.getfixturevalue("upload")(FILES))
        case "zip":
            return str(write_zip(tmp_path / "data.zip", FILES))
        case "zip folder":
            return f"{write_zip(tmp_path / 'packed.zip', inside)}/data"
        case _:
            return str(write_tar(tmp_path / "data.tar", {f"./{name}": content for name, content in FILES.items()}))


def test_files_and_images_are_listed_and_read(root: str) -> None:
    tree = pickle.loads(pickle.dumps(Tree(root)))
    assert {name: tree.read(uri) for name, uri in tree.files().items()} == {
        name: content for name, content in FILES.items() if "hidden" not in name
    }
    assert list(tree.files("images/val")) == ["images/val/c.png"]
    images = tree.images("images/train")
    assert {name: item.key for name, item in images.items()} == {
        "images/train/a.png": "a.png",
        "images/train/deep/b.jpg": "deep/b.jpg",
    }
    assert tree.read(images["images/train/a.png"].uri) == FILES["images/train/a.png"]
    assert tree.read_named("notes/read.txt") == b"text"
    assert [tree.has(name) for name in ("labels.json", "images/train", "images/tr", "b.jpg")] == [
        True,
        True,
        False,
        False,
    ]


def test_what_is_not_there_is_named_with_what_is(root: str) -> None:
    tree = Tree(root)
    with pytest.raises(
        InputError, match=r"there is no images/test; it holds train, val in images; check root and split"
    ):
        tree.files("images/test")
    with pytest.raises(InputError, match=r"there is no masks/val/1; it holds images, labels.json, notes; check"):
        tree.files("masks/val/1")
    with pytest.raises(InputError, match=r"there is no labels.jsn; it holds images, labels.json, notes; check"):
        tree.read_named("labels.jsn")


def test_a_file_elsewhere_is_named_by_its_whole_path(root: str, tmp_path: Path) -> None:
    other = write_files(tmp_path / "other", {"labels.json": b"[]"}) / "labels.json"
    assert Tree(root).read_named(str(other)) == b"[]"
    with pytest.raises(InputError, match=r"/nowhere/labels.json: no such file"):
        Tree(root).read_named("/nowhere/labels.json")


def test_what_is_no_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such file or folder"):
        Tree(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"gone.zip: no such zip file"):
        Tree(str(tmp_path / "gone.zip"))
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(write_tar(tmp_path / "a.tar", {"a.png": b""}).read_bytes()))
    with pytest.raises(InputError, match=r"is compressed by gzip"):
        Tree(str(packed)).files()
