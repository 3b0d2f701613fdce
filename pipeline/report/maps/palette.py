"""Fixed colours of numbered things: clusters, classes, objects; and colours laid over a photograph."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST = (  # of a palette that also readers with colour blindness tell apart, then others between them
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0),
    (86, 180, 233), (240, 228, 66), (128, 78, 160), (140, 90, 60), (120, 130, 140),
)  # fmt: skip
_GOLDEN = 0.61803398875  # hues that it steps through come near each other as late as can be
STRENGTH = 0.65
"""Share of the colour in an overlay."""


def colours_of(num: int) -> NDArray[np.uint8]:
    """The colour of each number, equal in every picture. Shapes: -> (num, 3) uint8."""
    later = [_later(idx) for idx in range(len(_FIRST), num)]
    return np.array([*_FIRST, *later][:num], np.uint8).reshape(num, 3)


def _later(idx: int) -> tuple[int, int, int]:
    saturation, value = (0.75, 0.85) if idx % 2 else (0.55, 1.0)
    red, green, blue = colorsys.hsv_to_rgb(idx * _GOLDEN % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(cells: NDArray[np.integer[Any]], height: int, width: int) -> NDArray[np.integer[Any]]:
    """Each pixel gets the number of the cell it lies in. Shapes: (h, w) -> (height, width)."""
    rows = np.arange(height) * cells.shape[0] // height
    columns = np.arange(width) * cells.shape[1] // width
    pixels: NDArray[np.integer[Any]] = cells[rows[:, None], columns]
    return pixels


def overlay(
    image: NDArray[np.uint8], numbers: NDArray[np.integer[Any]], colours: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Colours of numbers over the image in grey; where a number is negative, the image as it is.

    Shapes: image (H, W, 3), numbers (h, w), enlarged by cells; colours (K, 3) -> (H, W, 3).
    """
    numbers = enlarged(numbers, *image.shape[:2])
    grey = image.mean(axis=2, keepdims=True)
    blended = STRENGTH * colours[np.maximum(numbers, 0)] + (1 - STRENGTH) * grey
    chosen = np.where((numbers >= 0)[..., None], blended, image)
    return np.rint(chosen).astype(np.uint8)


def shrunk(image: NDArray[np.uint8], most_px: int) -> NDArray[np.uint8]:
    """The image with its longer side at most so long; a smaller one as it is. Shapes: (H, W, 3) -> (H', W', 3)."""
    from PIL import Image

    longest = max(image.shape[:2])
    if longest <= most_px:
        return image
    size = [max(1, round(side * most_px / longest)) for side in (image.shape[1], image.shape[0])]
    return np.asarray(Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BOX))
