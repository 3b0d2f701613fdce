"""A mask's file holds its class numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.distill.downstream.tuned.segmentation.files import class_colours, save_mask
from dtpipe.manifests.labels import ClassTable


@pytest.mark.parametrize(("num", "mode"), [(3, "P"), (256, "P"), (300, "I;16")])
def test_values_are_class_numbers(num, mode) -> None:
    numbers = np.random.default_rng(0).integers(0, num, (5, 7)).astype(np.uint8 if num <= 256 else np.int32)
    ((ending, content),) = save_mask(MaskPrediction(numbers), ClassTable.numbered(num))
    picture = Image.open(io.BytesIO(content))
    assert (ending, picture.mode, picture.size) == (".png", mode, (7, 5))
    assert np.array_equal(np.asarray(picture), numbers)


def test_colours_are_those_of_voc_and_none_occurs_twice() -> None:
    colours = class_colours(256)
    assert colours[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [224, 224, 192],
    ]
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
