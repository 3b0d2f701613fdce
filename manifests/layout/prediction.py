"""`predicted` images: what each pixel differs by from what its neighbours say, which zstd makes smaller than pixels.

One rule: arithmetic is modulo 256, so that nothing is lost. Red and blue are taken less green; each of the three is
then predicted from the pixels left (a), above (b) and above left (c), 0 outside the image, by the median of a, b and
a + b - c.

Source: Weinberger, Seroussi, Sapiro, "The LOCO-I lossless image compression algorithm", 2000, section III.A.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.compiled import compiled


def predicted(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Residuals of images. Shapes: [n, H, W, 3] -> [n, H, W, 3]."""
    residuals = np.array(images, np.uint8, order="C")
    _predict(residuals)
    return residuals


def restore(residuals: NDArray[np.uint8], chosen: NDArray[np.int64] | None = None) -> None:
    """Pixels in place of their residuals, of all images or those that are `chosen` by number, each once.

    Shapes: [n, H, W, 3], contiguous; [k].
    """
    _restore(residuals, np.arange(len(residuals)) if chosen is None else chosen)


@compiled("void(uint8[:,:,:,::1], int64[::1])")
def _restore(residuals: Any, chosen: Any) -> None:
    _, height, width, _ = residuals.shape
    for image in chosen:
        values = residuals[image]
        for y in range(height):
            left0 = left1 = left2 = corner0 = corner1 = corner2 = above0 = above1 = above2 = np.int64(0)
            for x in range(width):
                if y > 0:
                    above1 = np.int64(values[y - 1, x, 1])
                    above0 = (np.int64(values[y - 1, x, 0]) - above1) & 255
                    above2 = (np.int64(values[y - 1, x, 2]) - above1) & 255
                # a + b - c cut to what lies between a and b is the median of the three
                guess0 = max(min(left0, above0), min(max(left0, above0), left0 + above0 - corner0))
                guess1 = max(min(left1, above1), min(max(left1, above1), left1 + above1 - corner1))
                guess2 = max(min(left2, above2), min(max(left2, above2), left2 + above2 - corner2))
                left0 = (guess0 + np.int64(values[y, x, 0])) & 255
                left1 = (guess1 + np.int64(values[y, x, 1])) & 255
                left2 = (guess2 + np.int64(values[y, x, 2])) & 255
                corner0, corner1, corner2 = above0, above1, above2
                values[y, x, 0] = (left0 + left1) & 255
                values[y, x, 1] = left1
                values[y, x, 2] = (left2 + left1) & 255


@compiled("void(uint8[:,:,:,::1])")
def _predict(pixels: Any) -> None:
    """Residuals in place of their pixels, from the last one on."""
    num, height, width, _ = pixels.shape
    for image in range(num):
        values = pixels[image]
        for y in range(height - 1, -1, -1):
            for x in range(width - 1, -1, -1):
                green = left_green = above_green = corner_green = np.int64(0)
                for channel in (1, 0, 2):
                    left = above = corner = np.int64(0)
                    if x > 0:
                        left = np.int64(values[y, x - 1, channel])
                    if y > 0:
                        above = np.int64(values[y - 1, x, channel])
                    if x > 0 and y > 0:
                        corner = np.int64(values[y - 1, x - 1, channel])
                    value = np.int64(values[y, x, channel])
                    if channel == 1:
                        green, left_green, above_green, corner_green = value, left, above, corner
                    else:
                        value, left = value - green, (left - left_green) & 255
                        above, corner = (above - above_green) & 255, (corner - corner_green) & 255
                    guess = max(min(left, above), min(max(left, above), left + above - corner))
                    values[y, x, channel] = (value - guess) & 255
