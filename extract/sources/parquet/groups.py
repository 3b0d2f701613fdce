"""Decoded pieces of a container that several threads read from: each is decoded once and kept while there is room."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dtpipe.manifests.store.open_files import ProcessLock

_AT_LEAST = 2  # kept whatever their size: two shards are in hand at once


class GroupCache:
    """Least recently used groups up to a number of bytes; threads that want the same group wait for one decoding."""

    def __init__(self, decode: Callable[[tuple[str, int]], Any], max_bytes: int) -> None:
        """`decode` gives a value with `nbytes` for a (file, group)."""
        self._decode, self._max_bytes = decode, max_bytes
        self._lock = ProcessLock()
        self._groups: dict[tuple[str, int], Future[Any]] = {}  # oldest use first
        self.num_decoded = 0

    def get(self, name: tuple[str, int]) -> Any:
        """The decoded group. Raises: what `decode` raises; a failure is not kept."""
        with self._lock:
            future = self._groups.pop(name, None)
            mine = future is None
            future = future or Future()
            self._groups[name] = future
        if mine:
            self._fill(name, future)
        return future.result()

    def _fill(self, name: tuple[str, int], future: Future[Any]) -> None:
        try:
            value = self._decode(name)
        except BaseException as err:
            with self._lock:
                self._groups.pop(name, None)
            future.set_exception(err)
            return
        future.set_result(value)
        with self._lock:
            self.num_decoded += 1
            self._evict()

    def _evict(self) -> None:
        """Forget the oldest groups that are decoded."""
        done = {
            name: future.result().nbytes
            for name, future in self._groups.items()
            if future.done() and not future.exception()
        }
        total = sum(done.values())
        for name, size in list(done.items())[:-_AT_LEAST]:
            if total <= self._max_bytes:
                return
            del self._groups[name]
            total -= size
