"""What holds for every published layout: any container, any worker, and whatever is left over is said."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dtpipe.extract.sources.images import decode_image
from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.registry import LAYOUTS, open_layout
from dtpipe.manifests.errors import BadImage, ConfigError, InputError
from dtpipe.manifests.labels import Target
from parts import published_trees as trees
from parts.images import write_files
from parts.packing import write_tar, write_zip
from parts.published_trees import TREES

NAMES = sorted(TREES)
BESIDE = [name for name in NAMES if name not in ("imagenet", "coco", "coco-panoptic", "voc", "voc-ins")]


def opened(layout: str, root: object, split: str | None = None) -> LabelledSource:
    labelled = open_layout(f"{layout}:{root}@{split or TREES[layout][2]}")
    assert labelled is not None
    return labelled


def plain(value: Any) -> Any:
    """A target as lists and numbers, to compare."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def contents(labelled: LabelledSource) -> list[tuple[str, bytes, dict[str, Any]]]:
    """Key, bytes and target of each image."""
    rows = []
    for row, item in enumerate(labelled.items):
        data = labelled.read(row)
        target: Target = labelled.target(row, decode_image(data, 2**20).shape[:2])  # type: ignore[arg-type]
        assert type(target) is labelled.kind
        rows.append((item.key, data, {own.name: plain(getattr(target, own.name)) for own in fields(target)}))
    assert rows and [key for key, _, _ in rows] == sorted({key for key, _, _ in rows})
    return rows


@pytest.fixture
def in_a_folder(tmp_path: Path) -> Mapping[str, Path]:
    """The root of each tree."""
    return {name: write_files(tmp_path / name / root, make()) for name, (make, root, _) in TREES.items()}


def test_every_published_layout_has_a_tree_and_says_what_it_reads() -> None:
    assert [name for name in NAMES if LAYOUTS[name].name != name or not LAYOUTS[name].splits] == []
    assert all(LAYOUTS[name].reads.endswith(".") and TREES[name][2] in LAYOUTS[name].splits for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_zip_and_a_tar_hold_what_their_folder_holds(name: str, tmp_path: Path) -> None:
    make, root, _ = TREES[name]
    files = make()
    labelled = opened(name, write_files(tmp_path / root, files))
    for archive in (write_zip(tmp_path / f"{root}.zip", files), write_tar(tmp_path / f"{root}.tar", files)):
        packed = opened(name, archive)
        assert contents(packed) == contents(labelled)
        assert packed.classes == labelled.classes
        assert [note.replace(str(archive), "") for note in packed.notes()] == [
            note.replace(str(tmp_path / root), "") for note in labelled.notes()
        ]
    deep = write_zip(tmp_path / "all.zip", {f"data/{root}/{path}": data for path, data in files.items()})
    assert contents(opened(name, f"{deep}/data/{root}")) == contents(labelled)


def test_an_object_store_holds_what_its_folder_holds(in_a_folder: Mapping[str, Path], s3_url: str) -> None:
    store = fsspec.filesystem("s3")
    for name in ("imagenet", "ddpm-seg", "coco", "cityscapes-pan"):
        make, root, _ = TREES[name]
        url = f"{s3_url}/{name}/{root}"
        store.pipe({f"{url}/{path}": data for path, data in make().items()})
        assert contents(opened(name, url)) == contents(opened(name, in_a_folder[name]))
    with pytest.raises(InputError, match="there is no leftImg8bit/train; it holds val in leftImg8bit; check root and"):
        opened("cityscapes", f"{s3_url}/cityscapes-pan/cityscapes", "train")


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_reads_from_its_copy_what_the_first_reads(name: str, in_a_folder: Mapping[str, Path]) -> None:
    labelled = opened(name, in_a_folder[name])
    assert contents(pickle.loads(pickle.dumps(labelled))) == contents(labelled)


@pytest.mark.parametrize("name", BESIDE)
def test_what_has_no_partner_is_left_out_and_counted(name: str, in_a_folder: Mapping[str, Path]) -> None:
    labelled = opened(name, in_a_folder[name])
    without_label, without_image = labelled.notes()
    assert len(labelled.items) == 1
    assert without_label.startswith("left out 1 image of ") and "without a label in" in without_label
    assert without_image.startswith("left out 1 label of ") and "without an image in" in without_image
    assert ("unused" in without_image) == (name not in ("ddpm-seg", "datasetgan"))


@pytest.mark.parametrize("name", NAMES)
def test_a_split_that_there_is_none_of_is_refused(name: str, in_a_folder: Mapping[str, Path]) -> None:
    with pytest.raises((ConfigError, InputError), match="dev"):
        opened(name, in_a_folder[name], "dev")
    with pytest.raises(ConfigError, match=f"no split is named; write {name}:.*@{LAYOUTS[name].splits[0]} or "):
        open_layout(f"{name}:{in_a_folder[name]}")


@pytest.mark.parametrize("name", NAMES)
def test_a_root_that_is_another_folder_says_what_lies_there(name: str, tmp_path: Path) -> None:
    root = write_files(tmp_path / "bedroom_28", {"photos/a.jpg": trees.jpeg(1), "list.txt": b""})
    with pytest.raises(InputError, match=r"there is no .*; it holds list.txt, photos; check root and split"):
        opened(name, root)
    with pytest.raises(InputError, match="no such file or folder"):
        opened(name, tmp_path / "gone" / "bedroom_28")


def test_two_images_of_one_label_are_refused(tmp_path: Path) -> None:
    twin = {"images/training/ADE_train_00000001.jpeg": trees.jpeg(2)}
    root = write_files(tmp_path, {**trees.ade20k(), **twin})
    with pytest.raises(
        InputError, match=r"00000001.jpeg and ADE_train_00000001.jpg of .* have one label, .*; leave one"
    ):
        opened("ade20k", root)


def test_labels_of_other_names_are_refused_with_an_example(tmp_path: Path) -> None:
    files = {path.replace("ADE_train_00000001.png", "other.png"): data for path, data in trees.ade20k().items()}
    with pytest.raises(InputError, match=r"image ADE_train_00000001.jpg, which would have ADE_train_00000001.png, and"):
        opened("ade20k", write_files(tmp_path / "a", files))
    empty = {path: data for path, data in files.items() if not path.endswith(".png")}
    with pytest.raises(InputError, match=r"no file that ends in .png"):
        opened("ade20k", write_files(tmp_path / "b", {**empty, "annotations/training/readme.txt": b""}))


def test_a_list_of_voc_that_is_not_as_published_is_refused(tmp_path: Path) -> None:
    name = "ImageSets/Segmentation/train.txt"
    cases = {b"": "names no image", b"a\na\n": "names a twice", b"2008_1\n": "none of the 1 image of the list is there"}
    for data, message in cases.items():
        with pytest.raises(InputError, match=message):
            opened("voc", write_files(tmp_path, {**trees.voc(), name: data}))


def test_an_image_that_is_gone_since_the_listing_is_a_bad_image(in_a_folder: Mapping[str, Path]) -> None:
    labelled = opened("ade20k", in_a_folder["ade20k"])
    (in_a_folder["ade20k"] / "images" / "training" / "ADE_train_00000001.jpg").unlink()
    with pytest.raises(BadImage, match="unreadable"):
        labelled.read(0)
