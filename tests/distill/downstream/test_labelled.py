"""Labelled sets read what is asked for and no more; draws depend on keys and seed."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import raw_pixels
from dtpipe.distill.downstream.frozen.probe import linear_probe
from dtpipe.distill.downstream.labelled import (
    IGNORE,
    Draw,
    LabelledSet,
    check_apart,
    check_several_classes,
    count_classes,
    draw_labelled,
)
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Panoptic
from parts.labelled import all_images, all_masks, with_classes, with_masks


def make_set(num: int, num_classes: int = 3, px: int = 8, masks: bool = False) -> LabelledSet:
    images = np.random.default_rng(num).integers(0, 256, (num, px, px, 3), dtype=np.uint8)
    keys = [f"{idx:04d}.png" for idx in range(num)]
    if masks:
        return with_masks(images, keys, images[..., 0] % num_classes)
    return with_classes(images, keys, np.arange(num) % num_classes)


@settings(deadline=None, max_examples=30)
@given(num=st.integers(3, 30), seed=st.integers(0, 99))
def test_draws_of_classes_differ_by_at_most_one_and_nest(num: int, seed: int) -> None:
    labelled = make_set(30)
    rows = draw_labelled(labelled, num, seed)
    counts = np.bincount(labelled.read_classes(rows), minlength=3)
    assert len(set(rows.tolist())) == num
    assert counts.max() - counts.min() <= 1
    larger = draw_labelled(labelled, 30, seed)
    np.testing.assert_array_equal(larger[:num], rows)


@pytest.mark.parametrize("masks", [False, True])
def test_draw_depends_on_keys_not_on_their_order(masks: bool) -> None:
    labelled = make_set(20, masks=masks)
    shuffled = labelled.subset(np.random.default_rng(0).permutation(20))
    first = [labelled.keys[row] for row in draw_labelled(labelled, 6, 5)]
    second = [shuffled.keys[row] for row in draw_labelled(shuffled, 6, 5)]
    assert first == second
    assert first != [labelled.keys[row] for row in draw_labelled(labelled, 6, 6)]


def test_draws_that_cannot_be_made_are_refused() -> None:
    labelled = make_set(9)
    with pytest.raises(ConfigError, match=r"2 labelled images cannot cover 3 .* counts the images of all classes"):
        draw_labelled(labelled, 2, 0)
    with pytest.raises(ConfigError, match="10 labelled images are asked for and there are 9"):
        draw_labelled(labelled, 10, 0)
    with pytest.raises(ConfigError, match="both labelled for training and held out"):
        check_apart(labelled, labelled.subset([3]))


def test_a_subset_keeps_images_targets_and_digests_together() -> None:
    labelled = replace(make_set(6), digests=tuple("abcdef"))
    part = labelled.subset([4, 1]).subset(np.array([1, 0]))
    assert part.keys == ("0001.png", "0004.png") and part.digests == ("b", "e")
    np.testing.assert_array_equal(all_images(part), all_images(labelled)[[1, 4]])
    assert part.read_classes().tolist() == [1, 1] and len(part.classes) == 3


@dataclass(frozen=True)
class Stored:
    """Reads arrays of its own."""

    masks: np.ndarray

    def image(self, row: int) -> np.ndarray:
        return np.repeat(self.masks[row][..., None], 3, axis=2)

    def target(self, row: int) -> Mask:
        return Mask(self.masks[row])


def test_a_set_pickles_with_all_that_was_done_to_it() -> None:
    stored = Stored(np.random.default_rng(0).integers(0, 4, (6, 3, 5), dtype=np.uint8))
    table = ClassTable.numbered(4)
    labelled = LabelledSet(tuple("abcdef"), Mask, table, stored.image, stored.target).subset([5, 2, 3]).foreground()
    copy = pickle.loads(pickle.dumps(labelled.subset([2, 0])))
    assert copy.keys == ("d", "f") and copy.classes.names == ("background", "foreground")
    np.testing.assert_array_equal(all_masks(copy), stored.masks[[3, 5]] > 0)
    np.testing.assert_array_equal(all_images(copy)[..., 0], stored.masks[[3, 5]])


def test_no_more_targets_are_read_than_it_takes_to_see_two_classes() -> None:
    labelled, read = make_set(40), []
    watched = replace(labelled, target=lambda row: (read.append(row), labelled.target(row))[1])
    check_several_classes(watched, watched.subset(range(1, 40)))
    assert read == [0, 1, 1, 2]
    with pytest.raises(ConfigError, match="all held-out images are of one class, '1'"):
        check_several_classes(labelled, labelled.subset([1, 4, 7]))


def test_sets_without_any_object_are_refused_before_training() -> None:
    labelled = make_set(4)
    boxes = np.array([[0.0, 0.0, 4.0, 4.0]])
    objects = [Instances((8, 8), boxes, np.array([0]), crowd=np.array([crowd])) for crowd in (False, True)]
    some, none = (replace(labelled, kind=Instances, target=lambda _row, one=one: one) for one in objects)
    check_several_classes(some, some)
    with pytest.raises(ConfigError, match="no held-out image holds an object or segment that counts"):
        check_several_classes(some, none)


def test_classes_are_part_of_the_content_also_where_nobody_looked() -> None:
    labelled = make_set(6)
    assert labelled.content_digest() == make_set(6).content_digest()
    swapped = replace(labelled, target=lambda row: Class(1 - row if row < 2 else row % 3))
    assert swapped.content_digest() != labelled.content_digest()


def test_a_task_is_told_which_targets_it_lacks() -> None:
    labelled = make_set(4)
    for kind, lacks in ((Mask, "masks"), (Instances, "objects"), (Panoptic, "segments")):
        with pytest.raises(ConfigError, match=f"this task needs {lacks} and the labelled images have none"):
            labelled.need(kind)
    with pytest.raises(ConfigError, match="needs class labels"):
        make_set(4, masks=True).need(Class)


def test_a_task_reads_the_images_that_it_needs_one_batch_at_a_time() -> None:
    labelled, read = make_set(40), []
    train = replace(labelled, image=lambda row: (read.append(row), labelled.image(row))[1])
    assert read == []
    linear_probe(raw_pixels(), train, make_set(9), [Draw(0, np.array([3, 7, 5, 30]))], ProbeConfig(batch_size=3))
    assert read == [3, 5, 7, 30]


def test_parts_that_do_not_fit_are_refused() -> None:
    labelled = make_set(2)
    with pytest.raises(ConfigError, match="unique"):
        replace(labelled, keys=("a", "a"))
    with pytest.raises(ShapeError, match=r"image 0001.png is \(4, 4, 3\) uint8, the first is \(8, 8, 3\)"):
        replace(labelled, image=lambda row: np.zeros((8 // (row + 1),) * 2 + (3,), np.uint8)).read_images([0, 1])
    with pytest.raises(ShapeError, match=r"must be .* uint8"):
        replace(labelled, image=lambda _row: np.zeros((8, 8, 3))).read_images([0])
    with pytest.raises(ConfigError, match="needs masks and the labelled images have none"):
        labelled.read_masks([0])
    with pytest.raises(ConfigError, match="needs class labels and the labelled images have none"):
        make_set(2, masks=True).read_classes()


def test_foreground_keeps_ignored_pixels() -> None:
    masks = np.array([[[0, 3], [7, 1]]], np.uint8)
    labelled = with_masks(np.zeros((1, 2, 2, 3), np.uint8), ("a",), masks, ignore=7)
    np.testing.assert_array_equal(all_masks(labelled), [[[0, 3], [IGNORE, 1]]])
    np.testing.assert_array_equal(all_masks(labelled.foreground()), [[[0, 1], [IGNORE, 1]]])
    assert count_classes(labelled) == 4 and count_classes(labelled.foreground()) == 2
    assert labelled.find_classes() == {0, 1, 3} and labelled.foreground().find_classes() == {0, 1}


def test_classes_are_counted_over_all_sets() -> None:
    table = ClassTable.numbered(9)
    sets = [LabelledSet(("a",), Class, table, make_set(1).image, lambda _row, k=k: Class(k)) for k in (2, 4)]
    assert count_classes(*sets) == 5


def test_objects_become_masks_whose_background_has_a_name_of_its_own() -> None:
    """The smaller object lies on top, what only a crowd covers is ignored, and 300 classes have room."""
    masks = np.zeros((3, 4, 4), bool)
    masks[0, 1, 1], masks[1, :2, :3], masks[2, :3, 1:] = True, True, True
    boxes = np.zeros((3, 4))
    objects = Instances((4, 4), boxes, np.array([254, 7, 0]), masks, crowd=np.array([False, False, True]))
    table = ClassTable(("background", *map(str, range(1, 300))))
    image = np.zeros((4, 4, 3), np.uint8)
    labelled = LabelledSet(("a",), Instances, table, lambda _row: image, lambda _row: objects).as_masks()
    assert labelled.classes.names[:3] == ("other background", "background", "1")
    assert labelled.read_masks([0])[0].tolist() == [[8, 8, 8, -1], [8, 255, 8, -1], [0, -1, -1, -1], [0, 0, 0, 0]]
    assert labelled.find_classes() == {0, 8, 255}
    assert labelled.as_masks() is labelled
    with pytest.raises(ConfigError, match="needs masks"):
        make_set(3).as_masks()
