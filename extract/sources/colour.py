"""From a decoded file in any of Pillow's modes to RGB of 8 bits.

One rule: rows are converted a strip at a time, so that beside the decoder's image only the result is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

from dtpipe.manifests.errors import BadImage

_Pixels = NDArray[np.uint8]
_STRIP_PIXELS = 2**18
_BITS_TAG, _PHOTOMETRIC_TAG = 258, 262
_WHITE_IS_ZERO = 0


def to_rgb(image: ImageFile.ImageFile) -> _Pixels:
    """RGB of a loaded image, not yet turned; see `images.decode_image` for what becomes of each mode.

    Shapes: -> (H, W, 3) uint8. Raises: BadImage for values that are not finite.
    """
    convert = _conversion(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        pixels[top : top + strip.height] = convert(strip)
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Each strip with its first row."""
    num_rows = max(1, _STRIP_PIXELS // image.width)
    if num_rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, num_rows):
        yield top, image.crop((0, top, image.width, min(top + num_rows, image.height)))


def _conversion(image: ImageFile.ImageFile) -> Callable[[Image.Image], Any]:
    """What makes an array of a strip that broadcasts to (h, W, 3)."""
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = _display_range(image)
        inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
        return lambda strip: _grey8(np.asarray(strip), low, high, inverted)[:, :, None]
    if image.mode == "LAB":
        return lambda strip: np.asarray(ImageCms.applyTransform(strip, _lab_to_srgb()))
    return lambda strip: np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _grey8(values: NDArray[Any], low: float, high: float, inverted: bool) -> _Pixels:
    """Deep greyscale to 8 bits, rounded. Shapes: (h, W) -> (h, W)."""
    grey = np.floor((values.astype(np.float64) - low) * 255.0 / (high - low) + 0.5).astype(np.uint8)
    return 255 - grey if inverted else grey


def _display_range(image: ImageFile.ImageFile) -> tuple[float, float]:
    """The values shown as black and as white. Raises: BadImage."""
    lowest, highest = _extremes(image)
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_TAG, (16,))[0]
        return 0.0, float(2 ** min(bits, 16) - 1)
    if image.format == "PPM" and image.mode == "I":  # Pillow scales every maxval above 255 to 65535
        return 0.0, 65535.0
    nominal = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    for white in nominal:
        if lowest >= 0 and highest <= white:
            return 0.0, white
    return lowest, highest if highest > lowest else lowest + 1.0


def _extremes(image: Image.Image) -> tuple[float, float]:
    lowest, highest = np.inf, -np.inf
    for _, strip in _strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise BadImage(f"mode {image.mode}: not all values are finite")
        lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
    return lowest, highest


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
