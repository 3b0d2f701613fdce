"""Class folders: what is no class, or cannot be told apart, is refused with what to do; what is left out is said."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dtpipe.extract.sources.layouts.generic.folders import open_folders
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class
from parts.images import png, write_files
from parts.packing import write_parquet, write_tar, write_zip

PIXELS = png(np.zeros((4, 4, 3), np.uint8))


def folder(root: Path, *keys: str) -> str:
    return str(write_files(root, dict.fromkeys(keys, PIXELS)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["flowers/1.png", "flowers/2.png"], "all 2 images are of one class, 'flowers'.* if the classes lie deeper"),
        (["all/a/1.png", "all/b/2.png"], "of one class, 'all'.*--images ROOT/all, which holds a, b$"),
        (["train/a/1.png", "val/a/2.png"], "train, val are parts.*--images ROOT/train --test-images ROOT/val$"),
        (["Test/a/1.png", "Training/a/2.png"], "Test, Training are.*--images ROOT/Training --test-images ROOT/Test$"),
        (["extra/1.png", "test/2.png", "train/3.png"], "test, train are parts.*--images ROOT/train --test-images"),
        (["images/1.png", "labels/1.png"], "images, labels are parts.*the folder right above the class folders"),
        (["test/1.png", "validation/1.png"], "test, validation are parts.*the folder right above the class folders"),
        (["1.png", "2.png"], "no class folders; give class folders or --masks"),
        (["a/1.png", "b/1.png", "cover.png"], "1 of 3 images lie in none, cover.png for one"),
    ],
)
def test_folders_that_are_no_classes_are_refused(keys: list[str], said: str, tmp_path: Path) -> None:
    url = folder(tmp_path, *keys)
    with pytest.raises(ConfigError, match=said.replace("ROOT", url)):
        open_folders(url)


@pytest.mark.parametrize("keys", [["train/1.png", "bus/2.png"], ["test/1.png", "rehearsal/2.png"]])
def test_a_class_may_bear_the_name_of_a_part(keys: list[str], tmp_path: Path) -> None:
    url = folder(tmp_path, *keys)
    assert set(open_folders(url).classes.names) == {key.split("/")[0] for key in keys}


def test_folders_without_an_image_are_said(tmp_path: Path) -> None:
    url = folder(tmp_path, "cat/1.png", "dog/2.png", ".trash/3.png")
    for empty in ("bird", "fish/deeper"):
        (tmp_path / empty).mkdir(parents=True)
    source = open_folders(url)
    assert source.classes.names == ("cat", "dog")
    assert list(source.notes()) == ["left out folders without an image: bird, fish"]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([1, 1, 1], "all 3 images are of one class, 'red'"),
        ([0, -1, 1], "1 of 3 images have no label, b for one"),
    ],
)
def test_a_column_of_labels_that_says_nothing_is_refused(numbers: list[int], said: str, tmp_path: Path) -> None:
    url = str(write_parquet(tmp_path / "table.parquet", dict.fromkeys("abc", PIXELS), numbers, ("blue", "red")))
    with pytest.raises(ConfigError, match=f"table.parquet: {said}"):
        open_folders(url)


FILES = {f"train/{name}/{idx}.png": png(np.full((4, 4, 3), idx, np.uint8)) for idx, name in enumerate(("cat", "dog"))}


def labelled_tar(path: Path) -> str:
    """A shard as webdataset writes it."""
    files = [(key.split("/")[1], data) for key, data in FILES.items()]
    members = {
        f"{idx}{end}": data
        for idx, (name, image) in enumerate(files)
        for end, data in ((".png", image), (".cls", name.encode()))
    }
    return str(write_tar(path, members))


@pytest.mark.parametrize(
    "place",
    [
        lambda root, _: f"folders:{write_files(root, FILES)}@train",
        lambda root, _: f"folders:{write_files(root, FILES)}/train",
        lambda root, _: f"folders:{write_zip(root / 'a.zip', FILES)}@train",
        lambda root, upload: f"folders:{upload(FILES)}@train",
        lambda root, _: f"folders:{labelled_tar(root / 'train.tar').removesuffix('/train.tar')}@train.tar",
        lambda root, _: f"folders:{write_parquet(root / 'a.parquet', FILES, [0, 1], ('cat', 'dog'))}",
    ],
    ids=["folder", "without a split", "zip", "memory", "tar", "Parquet"],
)
def test_labels_are_those_of_any_source(
    place: Callable[..., str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    upload = request.getfixturevalue("upload") if "memory" in request.node.name else None
    source = pickle.loads(pickle.dumps(open_layout(place(tmp_path, upload))))
    assert source.classes.names == ("cat", "dog")
    assert [(source.read(row), source.target(row, (4, 4))) for row in range(2)] == [
        (FILES["train/cat/0.png"], Class(0)),
        (FILES["train/dog/1.png"], Class(1)),
    ]
