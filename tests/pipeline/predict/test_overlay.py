"""What is drawn: tints where segments are, colours of the mask's file, boxes of objects that are sure enough."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dtpipe.distill.downstream.tuned.predictions import (
    ClassPrediction,
    Detections,
    MaskPrediction,
    PanopticPrediction,
)
from dtpipe.distill.downstream.tuned.segmentation.files import class_colours
from dtpipe.manifests.labels import ClassTable
from dtpipe.pipeline.predict import overlay
from dtpipe.pipeline.predict.overlay import draw_overlay

TABLE = ClassTable(("background", "lamp", "window"))
GREY = np.full((40, 64, 3), 100, np.uint8)
SCALE = 5  # the longer side becomes 320 px


def drawn(prediction: object, classes: ClassTable = TABLE, image: np.ndarray = GREY) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draw_overlay(image, prediction, classes, 0.5))))


def test_a_mask_is_tinted_in_the_colours_of_its_file_and_the_background_is_not() -> None:
    numbers = np.zeros((40, 64), np.int64)
    numbers[10:20, 10:30] = 2
    picture = drawn(MaskPrediction(numbers))
    assert picture.shape[:2] > (40 * SCALE, 64 * SCALE - 1)  # a legend below
    np.testing.assert_allclose(picture[15 * SCALE, 20 * SCALE], (100 + class_colours(3)[2].astype(int)) / 2, atol=1)
    assert picture[30 * SCALE, 50 * SCALE].tolist() == [100, 100, 100]
    assert picture[15 * SCALE, 30 * SCALE - 1].tolist() == [255, 255, 255]  # its border


def test_objects_that_are_not_sure_are_left_out() -> None:
    masks = np.zeros((2, 40, 64), bool)
    masks[0, 20:30, 10:20], masks[1, 20:30, 40:50] = True, True
    boxes = np.array([[10, 20, 20, 30], [40, 20, 50, 30]], np.float32)
    objects = Detections((40, 64), boxes, np.array([0, 1]), np.array([0.9, 0.4], np.float32), masks)
    picture = drawn(objects, ClassTable(("lamp", "window")))
    assert picture[25 * SCALE, 15 * SCALE].tolist() != [100, 100, 100]
    assert picture[25 * SCALE, 45 * SCALE].tolist() == [100, 100, 100]
    boxes_alone = drawn(Detections((40, 64), boxes, objects.classes, objects.scores), ClassTable(("lamp", "window")))
    assert boxes_alone[25 * SCALE, 15 * SCALE].tolist() == [100, 100, 100]
    assert boxes_alone[20 * SCALE, 15 * SCALE].tolist() != [100, 100, 100]  # its upper edge


def test_each_of_many_classes_has_a_colour_of_its_own() -> None:
    """COCO's 80 as pairwise distances in RGB; of the palette of masks at full brightness several are equal."""
    colours = np.array([overlay._colour(number) for number in range(80)], float)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + 999 * np.eye(80)
    assert apart.min() > 10 and apart[:20, :20].min() > 60
    assert colours.max(axis=1).min() > 160  # bright on photographs


def test_the_legend_names_the_classes_that_are_drawn() -> None:
    boxes = np.array([[0, 0, 200, 200], [50, 50, 300, 300], [9, 9, 20, 20]], np.float32)
    objects = Detections((330, 400), boxes, np.array([2, 0, 1]), np.array([0.9, 0.8, 0.1], np.float32))
    _, legend = overlay.painted(np.zeros((330, 400, 3), np.uint8), objects, TABLE, 0.5)
    assert [name for name, _ in legend] == ["2 of 3 objects, score from 0.5", "background", "window"]
    assert [colour for _, colour in legend[1:]] == [overlay._colour(0), overlay._colour(2)]


@pytest.mark.parametrize(
    "prediction",
    [
        ClassPrediction(np.array([0.1, 0.7, 0.2], np.float32)),
        PanopticPrediction(np.ones((40, 64), np.int32), {1: 2}),
        Detections((40, 64), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32)),
        MaskPrediction(np.zeros((40, 64), np.int64)),
    ],
)
def test_every_kind_is_drawn_on_small_and_large_images_with_nothing_or_much_to_say(prediction: object) -> None:
    assert drawn(prediction).shape[1] == 320


def test_a_large_image_keeps_its_size_and_a_long_legend_is_cut() -> None:
    names = ClassTable(tuple(f"a class with a long name {number}" for number in range(40)))
    image = np.zeros((330, 400, 3), np.uint8)
    numbers = np.arange(330 * 400).reshape(330, 400) % 40
    picture = drawn(MaskPrediction(numbers), names, image)
    assert picture.shape[1] == 400 and 330 < picture.shape[0] < 800
