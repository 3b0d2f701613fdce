"""Masks as files: the class of each pixel, and how a mask follows its image to another size.

A mask is a lossless image file of the sample's key (PNG, BMP, TIFF, PPM, TGA): each pixel's value, or its index into
the palette, is a class; 0 is background. What could be read as other classes than were painted is refused by name.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.sources.images import MAX_PIXELS, open_image
from dtpipe.extract.sources.layouts.files import few
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.labels import ClassTable, Mask, Pixels
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.manifests.words import count_of

LOSSLESS = ("PNG", "BMP", "DIB", "TIFF", "PPM", "TGA")  # Pillow's names of formats
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # compressions inside a TIFF
_Number = TypeVar("_Number", bound=np.integer[Any])
_PAINTED = "masks are PNG files with one class number 0..255 per pixel"


def decode_mask(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Class of each pixel. Shapes: -> (H, W) uint8.

    Raises: InputError for a format that need not keep numbers, for colours, for values that are no numbers 0..255, and
    for more than `max_pixels`, which are counted before decoding.
    """
    try:
        with open_image(data, max_pixels) as image:
            kind = image.format or "?"
            if image.info.get("compression") in _LOSSY_TIFF:
                kind = f"{kind} with {image.info['compression']}"
            values = np.asarray(image)
    except BadImage as err:
        raise InputError(f"mask {where} cannot be read: {err.reason}; {_PAINTED}") from err
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


def check_shape(mask: NDArray[Any], image_px: tuple[int, int], where: str) -> None:
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


def check_classes(mask: Mask, table: ClassTable, where: str) -> None:
    """Refuse a mask with numbers that the table has no class for. Raises: InputError naming them."""
    if not len(table) or mask.numbers.max(initial=0) < len(table):
        return
    unknown = sorted(number for number in mask.occurring if number >= len(table))
    if unknown:
        num = int(np.isin(mask.numbers, unknown).sum())
        raise InputError(
            f"mask {where} has {count_of(num, 'pixel')} of class {few(list(map(str, unknown)))}, and the classes are "
            f"0 to {len(table) - 1} ({few(table.names)}); name them all, or say which value means 'no label'"
        )


def resize_mask(mask: NDArray[_Number], recipe: TransformRecipe) -> NDArray[_Number]:
    """The mask as its image is resized, by nearest neighbour. Shapes: (H, W) -> (recipe.height, recipe.width)."""
    height, width = recipe.height, recipe.width
    if recipe.resize == "center_crop":
        scale = max(height / mask.shape[0], width / mask.shape[1])
        covered = _nearest(mask, (round(mask.shape[0] * scale), round(mask.shape[1] * scale)))
        top, left = (covered.shape[0] - height) // 2, (covered.shape[1] - width) // 2
        return covered[top : top + height, left : left + width]
    return _nearest(mask, (height, width))


def _nearest(mask: NDArray[_Number], size: tuple[int, int]) -> NDArray[_Number]:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, mask.shape, strict=True)
    )
    picked: NDArray[_Number] = mask[rows[:, None], columns[None, :]]
    return picked
