"""Memory for what is read, used again once nobody holds it: new pages cost more time than filling them does.

One rule: memory comes back only when its last array, view or tensor is gone, so that who holds one never sees it
change.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dtpipe.manifests.store.open_files import ProcessLock

_LEAST_BYTES = 128 * 2**10  # malloc gives larger ones back to the system, above all in threads
_MOST_IDLE_BYTES = 2**30
_MOST_BACK = 8  # blocks that wait for the next one who asks; about a batch
_STEPS = 8  # sizes of blocks between two powers of two


class _Lease:
    """What an array's memory belongs to. Arrays, views and tensors hold it; with the last of them it goes back."""

    def __init__(self, block: NDArray[np.uint8], back: deque[NDArray[np.uint8]]) -> None:
        self._block, self._back = block, back
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        self._back.append(self._block)  # no lock: this may run anywhere


class Buffers:
    """Large arrays over memory that is used again; for many threads, picklable without the memory."""

    def __init__(self) -> None:
        self._idle: list[NDArray[np.uint8]] = []
        self._back: deque[NDArray[np.uint8]] = deque(maxlen=_MOST_BACK)
        self._changing = ProcessLock()

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """As `np.empty`."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size < _LEAST_BYTES:
            return np.empty(shape, dtype)
        lease = _Lease(self._block(_rounded(size)), self._back)
        return np.asarray(lease)[:size].view(dtype).reshape(shape)

    def _block(self, size: int) -> NDArray[np.uint8]:
        with self._changing:
            while self._back:
                self._idle.append(self._back.popleft())
            block = next((block for block in self._idle if len(block) == size), None)
            if block is not None:
                self._idle = [other for other in self._idle if other is not block]
            while sum(map(len, self._idle)) > _MOST_IDLE_BYTES:
                self._idle.pop(0)  # the one that was not wanted for longest
        return np.empty(size, np.uint8) if block is None else block


def _rounded(size: int) -> int:
    """The next size that blocks have, so that nearly equal arrays take the same ones."""
    step = 1 << max(0, size.bit_length() - _STEPS.bit_length())
    return -(-size // step) * step
