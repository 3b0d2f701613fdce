"""A lock file on this machine: held by one process at a time, and let go when that process ends, however it ends."""

from __future__ import annotations

import fcntl
import time
from typing import TextIO

_PATIENCE_S, _POLL_S = 3.0, 0.05


def hold(lock: TextIO) -> None:
    """Lock an open file for this process until it is closed.

    A killed process's lock lives on for a moment in the children that it was just starting, so that a first refusal
    is asked again for some seconds.

    Raises: BlockingIOError when another process keeps it; OSError where files cannot be locked.
    """
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(_POLL_S)
