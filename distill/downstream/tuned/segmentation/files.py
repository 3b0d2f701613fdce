"""A predicted mask as a file."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.manifests.labels import ClassTable


def save_mask(prediction: MaskPrediction, classes: ClassTable) -> Iterator[tuple[str, bytes]]:
    """One PNG of the image's size whose values are class numbers: with a palette up to 256 classes, else of 16 bits."""
    if len(classes) <= 256:
        picture = Image.fromarray(prediction.numbers.astype(np.uint8)).convert("P")
        picture.putpalette(class_colours(256).tobytes())
    else:
        picture = Image.fromarray(prediction.numbers.astype(np.uint16))
    content = io.BytesIO()
    picture.save(content, "PNG")
    yield ".png", content.getvalue()


def class_colours(num: int) -> NDArray[np.uint8]:
    """A colour for each class number, 0 black; near numbers differ most.

    Source: the palette of PASCAL VOC's masks, which spreads a number's bits over the high bits of red, green and blue.

    Shapes: -> (num, 3).
    """
    numbers = np.arange(num)
    colours = np.zeros((num, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours
