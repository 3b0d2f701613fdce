"""What to say where a batch has no room on its device, or on the host: told from other errors by what torch says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dtpipe.manifests.errors import DeviceMemoryError
from dtpipe.manifests.words import count_of

_NO_ROOM = ("out of memory", "can't allocate memory")  # of CUDA and MPS, and of the CPU


@contextmanager
def saying_what_to_lower(what: str, device: str, num_images: int, remedy: str) -> Iterator[None]:
    """In this block `what` goes through a network on a device, so many images at once; `remedy`: what to do.

    Raises: DeviceMemoryError where there is no room for them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as err:
        text = str(err)
        if not isinstance(err, MemoryError) and not any(words in text for words in _NO_ROOM):
            raise
        reason = text.splitlines()[0] if text else type(err).__name__
        raise DeviceMemoryError(
            f"{what}: {device} has no memory for {count_of(num_images, 'image')} at once ({reason}); {remedy}"
        ) from err
