"""How much a worker holds: batches on their way to bytes, and the bytes of shards that are not written yet.

One rule: whoever would exceed the limit waits while another shard holds something, so a shard that is too large alone
goes on.
"""

from __future__ import annotations

import threading
from collections import Counter

DEFAULT_BYTES = 2 * 10**9


class Room:
    """Bytes by shard; thread-safe."""

    def __init__(self, limit_bytes: int = DEFAULT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._held, self._changed = Counter[int](), threading.Condition()
        self.most_bytes = 0
        """The most that was held at once."""

    def take(self, shard_idx: int, size_bytes: int) -> None:
        """Hold more, waiting while it does not fit and another shard could give something back."""
        with self._changed:
            while self._others(shard_idx) and self._total + size_bytes > self._limit_bytes:
                self._changed.wait()
            self._hold(shard_idx, size_bytes)

    def exchange(self, shard_idx: int, old_bytes: int, new_bytes: int) -> None:
        """Hold something else in place of what was taken; never waits."""
        with self._changed:
            self._hold(shard_idx, new_bytes - old_bytes)

    def give_back(self, shard_idx: int) -> None:
        """Hold nothing more of a shard."""
        with self._changed:
            self._held.pop(shard_idx, None)
            self._changed.notify_all()

    def _hold(self, shard_idx: int, size_bytes: int) -> None:
        self._held[shard_idx] += size_bytes
        self.most_bytes = max(self.most_bytes, self._total)
        self._changed.notify_all()

    @property
    def _total(self) -> int:
        return sum(self._held.values())

    def _others(self, shard_idx: int) -> bool:
        return any(size > 0 for owner, size in self._held.items() if owner != shard_idx)
