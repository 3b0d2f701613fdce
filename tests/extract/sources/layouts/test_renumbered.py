"""Targets by the numbers of another table, whatever their kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.renumbered import with_classes_of
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Panoptic, Target

OWN, OTHER = ClassTable(("dog", "cat", "cow")), ClassTable(("cat", "bird", "dog"))


@dataclass(frozen=True)
class NoBytes:
    def read(self, uri: str) -> bytes:
        return b""


def by_other_table(target: Target, own: ClassTable = OWN) -> Target:
    source = ListedSource(type(target), own, [SourceItem("a.png", "a")], NoBytes(), lambda _row, _px: target)
    changed = with_classes_of(source, OTHER)
    assert (changed.kind, changed.classes, changed.items) == (type(target), OTHER, source.items)
    return changed.target(0, (1, 4))


def test_targets_of_each_kind_are_renumbered_by_name() -> None:
    assert by_other_table(Class(0)) == Class(2)
    boxes = Instances((1, 4), np.zeros((3, 4)), np.array([0, 1, 2]), crowd=np.array([False, False, True]))
    assert by_other_table(boxes).classes.tolist()[:2] == [2, 0]  # a crowd counts for nothing
    mask = by_other_table(Mask(np.array([[0, 1, 255, 1]], np.uint8)))
    assert np.where(mask.known, mask.numbers, -9).tolist() == [[2, 0, -9, 0]]
    every = by_other_table(Mask(np.array([[1, 1, 0, 0]], np.uint8), ignore=None))
    assert every.numbers.tolist() == [[0, 0, 2, 2]] and every.known.all()
    segments = Panoptic(np.array([[5, 6, 0, 0]], np.int32), {5: 1, 6: 0})
    assert by_other_table(segments).classes == {5: 0, 6: 2}


def test_an_ignored_value_that_is_a_class_of_the_other_table_stays_ignored() -> None:
    """Value 2 means no label here; there it is the dog."""
    mask = by_other_table(Mask(np.array([[0, 2, 1, 2]], np.uint8), ignore=2))
    assert mask.occurring == {2, 0}
    assert mask.known.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    "target",
    [
        Class(2),
        Mask(np.array([[0, 2]], np.uint8)),
        Panoptic(np.array([[1]], np.int32), {1: 2}),
        Instances((1, 4), np.zeros((1, 4)), np.array([2])),
    ],
)
def test_a_class_that_is_not_learned_from_is_refused_by_name(target: Target) -> None:
    with pytest.raises(InputError, match=r"a.png: class 'cow' is not among the classes to learn from, cat, bird, dog"):
        by_other_table(target)


def test_unnamed_masks_take_the_names_of_the_other_table() -> None:
    unnamed = ClassTable(())
    assert by_other_table(Mask(np.array([[0, 2]], np.uint8)), unnamed).occurring == {0, 2}
    with pytest.raises(InputError, match=r"mask a.png has 1 pixel of class 3, and the classes are 0 to 2"):
        by_other_table(Mask(np.array([[0, 3]], np.uint8)), unnamed)
