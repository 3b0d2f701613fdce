"""Pixels of labels as they stand in a PNG file: numbers, palette indices or channels, never colours.

What is read has the size of its image, so that no file can unpack to more than its image did.
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
