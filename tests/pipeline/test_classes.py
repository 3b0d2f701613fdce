"""What is no class, or cannot be told apart, is refused with what to do; what is left out is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.classes import check_scorable, class_folders, coverage_notes
from parts.images import png, write_files
from parts.labelled import with_classes, with_masks
from parts.packing import write_parquet

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
        class_folders(url, open_source(url).list(), print)


@pytest.mark.parametrize("keys", [["train/1.png", "bus/2.png"], ["test/1.png", "rehearsal/2.png"]])
def test_a_class_may_bear_the_name_of_a_part(keys: list[str], tmp_path: Path) -> None:
    url = folder(tmp_path, *keys)
    assert set(class_folders(url, open_source(url).list(), print).names) == {key.split("/")[0] for key in keys}


def test_folders_without_an_image_are_said(tmp_path: Path) -> None:
    url, notes = folder(tmp_path, "cat/1.png", "dog/2.png", ".trash/3.png"), []
    for empty in ("bird", "fish/deeper"):
        (tmp_path / empty).mkdir(parents=True)
    assert class_folders(url, open_source(url).list(), notes.append).names == ("cat", "dog")
    assert notes == ["left out folders without an image: bird, fish"]


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
        class_folders(url, open_source(url).list(), print)


def classes(*numbers: int, of: int = 4) -> LabelledSet:
    pixels = np.zeros((len(numbers) + 1, 4, 4, 3), np.uint8)
    labelled = with_classes(pixels, list(map(str, range(len(numbers) + 1))), [*numbers, of - 1])
    return labelled.subset(range(len(numbers)))


def masks(*values: int, ignore: int | None = 255) -> LabelledSet:
    pixels = np.zeros((len(values), 4, 4, 3), np.uint8)
    numbers = np.array(values, np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return with_masks(pixels, list(map(str, range(len(values)))), numbers, ignore)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (classes(0, 1), classes(1, 1), "all held-out images are of one class, '1'"),
        (classes(2, 2), classes(0, 1), "all labelled images are of one class, '2'"),
        (masks(1, 1), masks(0, 1), "all labelled masks hold pixels of one class, '1'"),
        (masks(2, 3).foreground(), masks(0, 1).foreground(), "all labelled masks hold .* one class, 'foreground'"),
        (masks(0, 1), masks(255, 255), "no pixel of the held-out masks counts.*255, which means 'no label' here"),
        (masks(0, 255), masks(0, 255), "one class, '0'.* 255, which means 'no label' here.*--ignore-value null$"),
        (masks(0, 9, ignore=9), masks(0, 9, ignore=9), "the value 9, which means 'no label' here"),
    ],
)
def test_sets_that_a_constant_answer_scores_well_on_are_refused(
    train: LabelledSet, test: LabelledSet, said: str
) -> None:
    ignore = 9 if "value 9" in said else 255
    with pytest.raises(ConfigError, match=said):
        check_scorable(train, test, ignore)


def test_masks_of_0_and_255_are_two_classes_when_none_is_ignored() -> None:
    both = masks(0, 255, ignore=None).foreground()
    check_scorable(both, both, None)
    assert both.find_classes() == {0, 1}


def test_classes_on_one_side_only_are_said() -> None:
    assert coverage_notes(classes(0, 1, 2), classes(0, 1, 2)) == []
    assert coverage_notes(classes(0, 1, 3), classes(0, 2, 1)) == [
        "no labelled image holds 2: nobody can find that, and it counts as missed",
        "no held-out image holds 3: the scores say nothing of that",
    ]
    assert coverage_notes(masks(0, 1), masks(0, 1, *range(2, 9))) == [
        "no labelled mask holds 2, 3, 4, 5, 6 and 2 more: nobody can find that, and it counts as missed"
    ]
