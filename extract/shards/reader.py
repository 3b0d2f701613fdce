"""From a row of a listing to its pixels at the size that a teacher takes.

A bad image is a `BadImage` with its reason; bytes that cannot be had right now are another error, so that a shard is
tried again instead of a good image being written off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.sources.base import Source
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.manifests.errors import BadImage, InputError, UnreachableError
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.manifests.store.patience import Patience, Request, patiently
from dtpipe.manifests.write.listing import Listing

READ_PATIENCE = Patience(silence_s=0.0, total_s=3.0, first_s=3.0)  # with what fails in an unknown way


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
        return self.decode_bytes(self.read(row))

    def read(self, row: int) -> bytes:
        """An image file as it lies in the source. Raises: as `image`."""
        return self._read(self.listing.keys[row], self.listing.uris[row])

    def decode_bytes(self, data: bytes) -> NDArray[np.uint8]:
        """As `decode`, of what was read. Raises: BadImage."""
        return decode_image(data, self.max_pixels)

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image in the teacher's size. Raises: BadImage when it should have that size already and does not."""
        return resize_image(image, self.transform)

    def _read(self, key: str, uri: str) -> bytes:
        """Bytes of one sample; a failure that may pass is waited for before it fails the shard."""
        request = Request("the source of images", "read", uri)
        try:
            return patiently(lambda _limit_s: self.source.read(uri), request, READ_PATIENCE, passes=_may_pass)
        except BadImage:
            raise
        except (InputError, OSError) as err:
            what = "; ".join([str(err), *getattr(err, "__notes__", ())])
            raise InputError(f"sample {key}: {what}; check the source, then run the same command again") from err


def _may_pass(error: Exception) -> bool:
    return isinstance(error, InputError | OSError) and not isinstance(error, BadImage | UnreachableError)
