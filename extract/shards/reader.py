"""From a row of a listing to its pixels at the size that a teacher takes.

A bad image is a `BadImage` with its reason; bytes that cannot be had right now are another error, so that a shard is
tried again instead of a good image being written off.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.sources.base import Source
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.manifests.write.listing import Listing

READ_TRIES = 3
READ_PAUSE_S = 0.2  # before the second try; four times as long before each further one


@dataclass(frozen=True)
class ImageReader:
    """Reads, decodes and resizes the images of a listing; thread-safe."""

    source: Source
    listing: Listing
    transform: TransformRecipe
    max_pixels: int

    def image(self, row: int) -> NDArray[np.uint8]:
        """The teacher's input of one row. Shapes: -> [H, W, 3] uint8.

        Raises: BadImage; InputError when reading fails for a reason that may pass.
        """
        return self.resize(self.decode(row))

    def decode(self, row: int) -> NDArray[np.uint8]:
        """An image in its own size. Shapes: -> [H, W, 3] uint8. Raises: as `image`."""
        return decode_image(self._read(self.listing.keys[row], self.listing.uris[row]), self.max_pixels)

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image in the teacher's size. Raises: BadImage when it should have that size already and does not."""
        return resize_image(image, self.transform)

    def _read(self, key: str, uri: str) -> bytes:
        """Bytes of one sample; a failure that may pass is tried again before it fails the shard."""
        for attempt in range(READ_TRIES):
            try:
                return self.source.read(uri)
            except BadImage:
                raise
            except (InputError, OSError) as err:
                failure = err
            time.sleep(READ_PAUSE_S * 4**attempt)
        raise InputError(
            f"sample {key}: reading {uri} failed {READ_TRIES} times ({failure}); "
            f"check the source, then run the same command again"
        ) from failure
