"""Masks as files: the class of each pixel, and how a mask follows its image to another size.

A mask is a lossless image file of the sample's key (PNG, BMP, TIFF, PPM, TGA): each pixel's value, or its index into
the palette, is a class; 0 is background. What could be read as other classes than were painted is refused by name.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Pixels
from dtpipe.manifests.schema import TransformRecipe

LOSSLESS = ("PNG", "BMP", "DIB", "TIFF", "PPM", "TGA")  # Pillow's names of formats
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # compressions inside a TIFF
_PAINTED = "masks are PNG files with one class number 0..255 per pixel"


def decode_mask(data: bytes, where: str) -> Pixels:
    """Class of each pixel. Shapes: -> (H, W) uint8.

    Raises: InputError for a format that need not keep numbers, for colours, and for values that are no numbers 0..255.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or "?"
            if image.info.get("compression") in _LOSSY_TIFF:
                kind = f"{kind} with {image.info['compression']}"
            values = np.asarray(image)
    except Exception as err:  # decoders raise what they like
        raise InputError(f"mask {where} cannot be read: {type(err).__name__}: {err}; {_PAINTED}") from err
    if kind not in LOSSLESS:
        raise InputError(
            f"mask {where} is {kind}, and such files need not keep class numbers: JPEG blurs them, GIF renumbers them; "
            f"{_PAINTED}; make them from what these were made from"
        )
    return _class_numbers(values, where)


def _class_numbers(values: NDArray[Any], where: str) -> Pixels:
    """One channel of whole numbers. Colour channels that are equal count as one."""
    if values.ndim == 3 and values.shape[-1] >= 3 and (values[..., :1] == values[..., :3]).all():
        values = values[..., 0]
    if values.ndim != 2:
        num_colours = len(np.unique(values.reshape(-1, values.shape[-1]), axis=0))
        raise InputError(
            f"mask {where} has {num_colours} colours in {values.shape[-1]} channels, and a colour is no class number; "
            f"{_PAINTED}; give each colour its number"
        )
    with np.errstate(invalid="ignore"):  # NaN
        numbers: Pixels = values.astype(np.uint8)
    odd = values[numbers != values]
    if odd.size:
        raise InputError(f"mask {where} has {odd.size} pixels of other values, {odd[0]} for one; {_PAINTED}")
    return numbers


def check_shape(mask: Pixels, image_px: tuple[int, int], where: str) -> None:
    """Refuse a mask whose aspect is not its image's, to a pixel: it would lie beside what it marks.

    Shapes: mask (H, W), of any scale; `image_px` is the height and width of the image.
    Raises: InputError naming both sizes.
    """
    height, width = image_px
    off = min(abs(mask.shape[0] - height * mask.shape[1] / width), abs(mask.shape[1] - width * mask.shape[0] / height))
    if off > 1:
        raise InputError(
            f"mask {where} has {mask.shape[1]}x{mask.shape[0]} px and its image, turned as its orientation tag says, "
            f"{width}x{height}; give masks of their images' size, or of the same aspect"
        )


def resize_mask(mask: Pixels, recipe: TransformRecipe) -> Pixels:
    """The mask as its image is resized, by nearest neighbour. Shapes: (H, W) -> (recipe.height, recipe.width)."""
    height, width = recipe.height, recipe.width
    if recipe.resize == "center_crop":
        scale = max(height / mask.shape[0], width / mask.shape[1])
        covered = _nearest(mask, (round(mask.shape[0] * scale), round(mask.shape[1] * scale)))
        top, left = (covered.shape[0] - height) // 2, (covered.shape[1] - width) // 2
        return covered[top : top + height, left : left + width]
    return _nearest(mask, (height, width))


def _nearest(mask: Pixels, size: tuple[int, int]) -> Pixels:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, mask.shape, strict=True)
    )
    picked: Pixels = mask[rows[:, None], columns[None, :]]
    return picked
