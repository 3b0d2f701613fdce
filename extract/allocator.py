"""Memory that a process has freed stays with it, for its next batch.

glibc hands large blocks back to the system, which clears each page again when the next batch asks for it: on a CPU that
takes up to a fifth of a teacher's time. Threads have heaps of their own, which hold no block above 64 MB and are handed
back whole; here they share the first one. What is computed is the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Final

_OPTIONS: Final = {  # of glibc's malloc.h
    -3: 1 << 30,  # M_MMAP_THRESHOLD: no smaller block lies apart
    -1: 1 << 30,  # M_TRIM_THRESHOLD: so much may be free at the end
    -8: 1,  # M_ARENA_MAX: heaps, for threads that begin later
    -2: 128 << 20,  # M_TOP_PAD: more than a thread's heap has, so that none there is already is handed back
}


def keep_freed_memory() -> bool:
    """Have malloc keep up to 1 GiB that is free, and all threads share it; for processes of our own alone.

    Returns whether it does: not on systems without glibc, nor where the environment sets malloc up itself.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    with contextlib.suppress(AttributeError, OSError):  # another C library has no mallopt
        library = ctypes.CDLL(None)
        taken = [library.mallopt(option, value) for option, value in _OPTIONS.items()]
        return all(taken)
    return False
