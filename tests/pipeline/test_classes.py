"""Classes that cannot be told apart are refused with what to do; those on one side only are said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Mask
from dtpipe.pipeline.classes import check_scorable, coverage_notes
from parts.labelled import with_classes, with_masks


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


def test_very_many_masks_are_not_read_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtpipe.pipeline.classes.LOOKED_AT", 2)

    def unreadable(_row: int) -> Mask:
        raise AssertionError("read")

    many = replace(masks(0, 1, 2), target=unreadable)
    assert coverage_notes(masks(0, 1), many) == [
        "which classes stand on one side only is not known: 3 images are too many to read them all first"
    ]
    seen = replace(many, occurring=frozenset({0, 1}))
    assert coverage_notes(masks(0, 1), seen) == []
    assert coverage_notes(classes(0, 1, 1), classes(0, 1, 0)) == []  # reading a class costs nothing
