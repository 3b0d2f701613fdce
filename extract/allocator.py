"""Memory that a process has freed stays with it, for its next batch.

glibc hands large blocks back to the system, which clears each page again when the next batch asks for it: on a CPU that
takes up to a fifth of a teacher's time. What is computed is the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Have malloc keep up to 1 GiB that is free at its end, and no smaller block apart; for processes of our own alone.

    Returns whether it does: not on systems without glibc, nor where the environment sets malloc up itself.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    with contextlib.suppress(AttributeError, OSError):  # another C library has no mallopt
        library = ctypes.CDLL(None)
        return all(library.mallopt(option, _KEPT_BYTES) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
    return False
