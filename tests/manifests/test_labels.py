"""Targets and class tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import (
    Class,
    ClassTable,
    Instances,
    Mask,
    Panoptic,
    Target,
    class_table,
    mask_classes,
    target_digest,
)


@pytest.mark.parametrize(
    ("ignore", "occurring"), [(255, {0, 1, 7}), (7, {0, 1, 255}), (None, {0, 1, 7, 255}), (0, {1, 7, 255})]
)
def test_classes_that_occur_leave_out_what_is_ignored(ignore: int | None, occurring: set[int]) -> None:
    mask = Mask(np.array([[0, 7], [255, 1]], np.uint8), ignore)
    assert mask.occurring == occurring
    assert mask.known.sum() == len(occurring)


def test_a_mask_of_which_nothing_counts_holds_no_class() -> None:
    assert Mask(np.full((2, 2), 255, np.uint8)).occurring == frozenset()


@pytest.mark.parametrize("ignore", [1, 9, 255])
def test_foreground_and_ignored_pixels_are_told_apart_whatever_the_ignored_value(ignore: int) -> None:
    foreground = Mask(np.array([[0, 5, ignore]], np.uint8), ignore).foreground()
    assert foreground.known.tolist() == [[True, True, False]]
    assert foreground.numbers[0, :2].tolist() == [0, 1]


def test_classes_are_numbered_by_name() -> None:
    table = class_table(["dog", "cat", "dog"])
    assert table == ClassTable(("cat", "dog"))
    assert table.number("dog", "a.png") == 1
    assert class_table(["dog", None]) is None
    with pytest.raises(InputError, match=r"a.png: class 'cow' is not among the classes to learn from, cat, dog"):
        table.number("cow", "a.png")
    with pytest.raises(ConfigError, match="occurs twice"):
        ClassTable(("cat", "cat"))


def test_specks_are_ignored_as_the_label_efficient_benchmark_does() -> None:
    """Against its rule as a loop over classes, with 19, 20 and 21 pixels and the ignored value below and above."""
    numbers = np.repeat([0, 1, 2, 3, 9], [30, 19, 20, 21, 3]).astype(np.uint8).reshape(1, -1)
    for ignore in (0, 9, 255):
        expected = numbers.copy()
        for number in range(10):
            if number != ignore and 0 < (expected == number).sum() < 20:
                expected[expected == number] = ignore
        cleaned = Mask(numbers, ignore).without_specks()
        np.testing.assert_array_equal(cleaned.numbers, expected)
        assert cleaned.ignore == ignore and cleaned.numbers.dtype == np.uint8
    assert 1 in Mask(numbers).without_specks(below_px=19).occurring
    with pytest.raises(ConfigError, match="no value"):
        Mask(numbers, None).without_specks()


def objects(*masks: list[list[int]], classes: list[int], crowd: list[bool]) -> Instances:
    """Objects of 2 x 3 px."""
    pixels = np.array(masks, dtype=bool).reshape(-1, 2, 3)
    return Instances(
        (2, 3), np.zeros((len(classes), 4)), np.array(classes, dtype=np.int64), pixels, np.array(crowd, bool)
    )


def test_an_image_without_objects_is_all_background() -> None:
    mask = objects(classes=[], crowd=[]).as_mask()
    assert mask.numbers.tolist() == [[0, 0, 0], [0, 0, 0]] and mask.occurring == {0}


def test_smaller_objects_lie_on_larger_ones_and_on_crowds_of_which_the_rest_is_ignored() -> None:
    """Class 254 is number 255 of the mask, and is none the less learned."""
    small, large, crowd = [[0, 1, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 1]]
    mask = objects(small, large, crowd, classes=[254, 7, 7], crowd=[False, False, True]).as_mask()
    assert np.where(mask.known, mask.numbers, -9).tolist() == [[8, 255, 0], [8, 8, -9]]
    assert mask.occurring == {0, 8, 255}


def test_masks_of_objects_have_a_background_beside_the_classes() -> None:
    assert mask_classes(ClassTable(("cat", "dog"))).names == ("background", "cat", "dog")
    assert mask_classes(ClassTable(("background",))).names == ("other background", "background")


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        (Class(1), {"number": 2}),
        (Mask(np.zeros((2, 3), np.uint8)), {"numbers": np.ones((2, 3), np.uint8), "ignore": None}),
        (
            Instances((4, 4), np.zeros((1, 4)), np.array([1]), np.zeros((1, 4, 4), bool), np.array([False])),
            {
                "boxes": np.ones((1, 4)),
                "classes": np.array([2]),
                "masks": np.ones((1, 4, 4), bool),
                "crowd": np.array([True]),
                "areas": np.array([3.0]),
            },
        ),
        (
            Panoptic(np.ones((2, 2), np.int32), {1: 4, 2: 5}),
            {"segments": np.zeros((2, 2), np.int32), "classes": {1: 4, 2: 6}, "crowd": frozenset({1})},
        ),
    ],
)
def test_a_digest_of_a_target_changes_with_each_part_of_it(target: Target, changes: dict[str, Any]) -> None:
    assert target_digest(target) == target_digest(replace(target))
    digests = {target_digest(replace(target, **{name: value})) for name, value in changes.items()}
    assert len(digests | {target_digest(target)}) == 1 + len(changes)


def test_a_digest_of_segments_does_not_depend_on_their_order() -> None:
    segments = np.ones((2, 2), np.int32)
    assert target_digest(Panoptic(segments, {1: 4, 2: 5})) == target_digest(Panoptic(segments, {2: 5, 1: 4}))
