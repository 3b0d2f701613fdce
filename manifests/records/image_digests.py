"""Images known by their content: 64 bits of the blake3 of their pixels, and a file of them.

Two different images of a million and a hundred thousand have one digest with a chance of 1 in 100 million. The file is
the blake3 of what follows it (32 bytes), then the digests, little-endian, in any order; it says nothing of the images.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.manifests.documents import why_not_read
from dtpipe.manifests.errors import DamagedDataError, InputError
from dtpipe.manifests.labels import Pixels

TRAIN_IMAGES = "train_images.blake3"
"""In the folder of a teacher, the images that it was trained on, at its own size; in that of an interpreter, its
labelled images at the size of its features."""
Digests = NDArray[np.uint64]
_SEAL_BYTES = 32


def image_digest(pixels: Pixels) -> int:
    """Of an image (H, W, 3) uint8. Range [0, 2**64)."""
    return short_digest(blake3(pixels.tobytes()).hexdigest())


def short_digest(digest: str) -> int:
    """From the whole blake3 of an image's pixels, in hex."""
    return int(digest[:16], 16)


def as_digests(values: Iterable[int]) -> Digests:
    """Distinct digests in order. Shapes: -> (n,)."""
    return np.unique(np.fromiter(values, dtype=np.uint64))


def pack_digests(digests: Digests) -> bytes:
    """The content of a file."""
    content = digests.astype("<u8").tobytes()
    return blake3(content).digest() + content


def read_digests(path: Path, remedy: str = "train or export the teacher again") -> Digests:
    """The digests of a file; `remedy`: what to do where it is not there.

    Raises: InputError when it is not there; DamagedDataError when it is none or was changed.
    """
    try:
        packed = path.read_bytes()
    except OSError as err:
        raise InputError(f"{path}: {why_not_read(path, err)}; {remedy}") from err
    seal, content = packed[:_SEAL_BYTES], packed[_SEAL_BYTES:]
    if blake3(content).digest() != seal or len(content) % 8:
        raise DamagedDataError(f"{path}: is no list of images, or its bytes were changed; take it away and run again")
    return np.frombuffer(content, "<u8").astype(np.uint64)
