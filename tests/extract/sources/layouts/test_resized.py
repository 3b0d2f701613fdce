"""Targets lie on their resized images as they lay on the whole ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from dtpipe.extract.sources.images import resize_image
from dtpipe.extract.sources.layouts.resized import resize_target
from dtpipe.manifests.labels import Class, Instances, Mask, Panoptic
from dtpipe.manifests.schema import TransformRecipe

WHOLE = (60, 100)


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros(WHOLE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("resize", ["center_crop", "stretch"])
@pytest.mark.parametrize("size", [(30, 30), (24, 40), (90, 60)])
def test_objects_lie_where_their_pixels_lie(resize: str, size: tuple[int, int]) -> None:
    """Each object is a white rectangle of the image. Where it is bright, its mask is, but for the rim, as is its box,
    to a pixel."""
    rectangles = [(30, 10, 70, 50), (55, 20, 80, 33)]
    masks = np.stack([rectangle(*edges) for edges in rectangles])
    objects = Instances(WHOLE, np.array(rectangles, float), np.array([4, 2]), masks, np.array([False, True]))
    recipe = TransformRecipe(resize=resize, height=size[0], width=size[1])
    resized = resize_target(objects, recipe)
    assert resized.size_px == size and resized.classes.tolist() == [4, 2] and resized.crowd.tolist() == [False, True]
    for mask, own, box in zip(masks, resized.masks, resized.boxes, strict=True):
        bright = resize_image(np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255, recipe)[..., 0] > 127
        assert (bright != own).mean() < 0.05
        rows, columns = np.nonzero(bright)
        assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1)


def test_objects_outside_of_a_crop_are_left_out_and_others_are_cut() -> None:
    """60 x 100 px to its middle 60 x 60: columns 20 to 80 are left, by hand."""
    rectangles = [(0, 0, 19, 60), (10, 10, 30, 20), (70, 0, 100, 60)]
    masks = np.stack([rectangle(*edges) for edges in rectangles])
    objects = Instances(WHOLE, np.array(rectangles, float), np.array([1, 2, 3]), masks, areas=np.array([9.0, 9, 9]))
    resized = resize_target(objects, TransformRecipe(height=60, width=60))
    assert resized.classes.tolist() == [2, 3]
    assert resized.boxes.tolist() == [[0, 10, 10, 20], [50, 0, 60, 60]]
    assert_array_equal(resized.masks, masks[1:, :, 20:80])
    assert resized.areas is None and resized.crowd is None


def test_nothing_left_is_an_image_without_objects() -> None:
    objects = Instances(WHOLE, np.array([[0.0, 0, 5, 5]]), np.array([1]), rectangle(0, 0, 5, 5)[None])
    resized = resize_target(objects, TransformRecipe(height=30, width=30))
    assert len(resized) == 0 and resized.masks.shape == (0, 30, 30) and resized.boxes.shape == (0, 4)
    boxes = resize_target(Instances(WHOLE, objects.boxes, objects.classes), TransformRecipe(height=30, width=30))
    assert len(boxes) == 0 and boxes.masks is None


def test_masks_and_segments_keep_their_values_and_classes_stay() -> None:
    numbers = np.arange(24, dtype=np.int32).reshape(4, 6)
    recipe = TransformRecipe(resize="stretch", height=2, width=3)
    assert resize_target(Class(3), recipe) == Class(3)
    mask = resize_target(Mask(numbers, ignore=7), recipe)
    assert_array_equal(mask.numbers, numbers[1::2, 1::2])
    assert mask.ignore == 7
    segments = resize_target(Panoptic(numbers, {1: 0}, frozenset({5})), recipe)
    assert_array_equal(segments.segments, numbers[1::2, 1::2])
    assert (segments.classes, segments.crowd) == ({1: 0}, {5})
