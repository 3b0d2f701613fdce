"""Pixels of labels as they stand in a file: in a PNG numbers, palette indices or channels, never colours; in an .npy
numbers.

A PNG has the size of its image, and an array a bounded one, so that no file can unpack to more.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtpipe.extract.sources.layouts.listed import ReadsUris
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.labels import Target

Values = NDArray[np.integer[Any]]
_MAX_PX = 4096  # a side of an array
_NUMBER_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


@dataclass(frozen=True, eq=False)
class PngLabels:
    """Targets from one PNG file for each image, by row."""

    files: ReadsUris
    where: str
    """Root of the data set, for messages."""
    labels: Sequence[tuple[str, str]]
    """Name below the root and URI of each label."""
    channels: int
    """1: numbers or palette indices; 3, 4: values of channels."""
    read_target: Callable[[Values, str], Target]
    """From (H, W) or (H, W, channels) values and what to call the file."""

    def __call__(self, row: int, image_px: tuple[int, int]) -> Target:
        """Raises: InputError naming the file that is unreadable, of another size, or holds an unknown number."""
        name, uri = self.labels[row]
        where = f"{self.where}: {name}"
        return self.read_target(read_png(read_label(self.files, uri, where), where, image_px, self.channels), where)


def read_label(files: ReadsUris, uri: str, where: str) -> bytes:
    """Bytes of a label. Raises: InputError, since an image without its label cannot be passed over."""
    try:
        return files.read(uri)
    except BadImage as err:
        raise InputError(f"{where} cannot be read: {err.reason}; put it there again") from err


def read_png(data: bytes, where: str, image_px: tuple[int, int], channels: int) -> Values:
    """Shapes: -> (H, W) for one channel, else (H, W, channels). Raises: InputError."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check_label_size((image.height, image.width), image_px, where)
            mode = image.mode
            values: Values = np.asarray(image)
    except InputError:
        raise
    except Exception as err:  # decoders raise what they like
        raise InputError(f"{where} is no PNG file that can be read ({type(err).__name__}); fetch it again") from err
    if (mode in _NUMBER_MODES) != (channels == 1) or (channels > 1 and values.shape[-1] != channels):
        seen = f"{values.shape[-1]} channels" if values.ndim == 3 else "one channel"
        raise InputError(f"{where} has {seen}, and the published file has {channels}; fetch it again, unconverted")
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def read_array(data: bytes, where: str) -> Values:
    """An .npy file of whole numbers; axes of length 1 are left out. Shapes: -> (H, W).

    Raises: InputError for anything else, before it takes memory; what holds objects is not unpickled.
    """
    again = "fetch it again"
    try:
        with np.errstate(invalid="ignore"):
            file = io.BytesIO(data)
            shape = _array_shape(file)
            sides = shape if len(shape) == 2 else tuple(side for side in shape if side != 1)
            if len(sides) != 2 or not 0 < min(sides) <= max(sides) <= _MAX_PX:
                raise InputError(f"{where} has shape {shape}; a mask has a class number per pixel; {again}")
            file.seek(0)
            values = np.load(file, allow_pickle=False).reshape(sides)
            numbers: Values = values.astype(np.int64)
    except InputError:
        raise
    except Exception as err:  # readers raise what they like
        raise InputError(f"{where} is no array of numbers that can be read ({err}); {again}") from err
    odd = values[numbers != values]
    if odd.size:
        raise InputError(f"{where} holds {odd[0]}, which is no class number; {again}")
    return numbers


def _array_shape(file: io.BytesIO) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return tuple(read(file)[0])


def check_label_size(label_px: tuple[int, int], image_px: tuple[int, int], where: str) -> None:
    """Refuse labels of another height and width than their image. Raises: InputError naming both sizes."""
    if label_px != image_px:
        raise InputError(
            f"{where} has {label_px[1]}x{label_px[0]} px and its image, turned as its orientation tag says, "
            f"{image_px[1]}x{image_px[0]}; labels and images must be of one release, none of them resized"
        )


def renumbered(values: Values, lookup: NDArray[np.uint8], known: NDArray[np.bool_], where: str) -> NDArray[np.uint8]:
    """`lookup[value]` of every pixel. Shapes: (H, W) -> (H, W). Raises: InputError for a value that is not known."""
    odd = values[(values < 0) | (values >= len(lookup)) | ~known[np.clip(values, 0, len(known) - 1)]]
    if odd.size:
        raise InputError(
            f"{where} holds the value {odd[0]}, which is the number of no class; known are "
            f"{_ranges(np.flatnonzero(known))}; is it of another data set, or resized with interpolation?"
        )
    numbers: NDArray[np.uint8] = lookup[values]
    return numbers


def _ranges(numbers: NDArray[np.intp]) -> str:
    """Such as `0-18, 255`."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
