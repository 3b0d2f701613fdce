"""Which shards wait, which failed, and when a failure ends the run: the rules that inline and Ray runs share.

A shard that was lost with its node goes back at once and is not held against it. A shard that failed is tried again
after a pause, `retries` times, then set aside while the others go on; `raise_if_failed` reports it at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from dtpipe.manifests.errors import (
    ConfigError,
    DeviceMemoryError,
    DtpipeError,
    ErrorBudgetError,
    IncompleteError,
    MissingPackageError,
    StoreError,
)
from dtpipe.manifests.words import count_of

FATAL = (ConfigError, ErrorBudgetError, MissingPackageError)  # no other shard would fare better
LONGEST_PAUSE_S = 60.0
SHARDS_IN_HAND = 2  # per worker: one in the teacher, one in the writer; it never holds more in memory


@dataclass
class ShardTask:
    """One shard to extract."""

    shard_idx: int
    failures: int = 0
    alone: bool = False
    """A worker died while it had this shard: next time it shares its worker with no other, so that only it can be
    blamed."""
    not_before_s: float = 0.0
    error: str = ""

    def failure(self, again: bool) -> str:
        """What to say of its last failure."""
        return f"shard {self.shard_idx} failed ({self.error}); {'it is tried again' if again else 'it is set aside'}"


class ShardQueue:
    """Shards that wait for a worker, in order; failures are counted per shard."""

    def __init__(self, shards: Iterable[int], retries: int) -> None:
        self._waiting = [ShardTask(shard_idx) for shard_idx in shards]
        self._retries = retries
        self.failed: list[ShardTask] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, *, share: bool = False) -> ShardTask | None:
        """The next shard whose pause is over; with `share`, only one that may run beside another."""
        now_s = time.monotonic()
        for position, task in enumerate(self._waiting):
            if task.not_before_s <= now_s and not (share and task.alone):
                return self._waiting.pop(position)
        return None

    def put_back(self, task: ShardTask) -> None:
        """Return a shard that was lost through no fault of its own, to be taken next."""
        self._waiting.insert(0, task)

    def fail(self, task: ShardTask, error: BaseException | str, *, alone: bool = False) -> bool:
        """Count a failure; True if the shard will be tried again.

        Raises: `error` itself when no shard would fare better, or when store or memory have failed on every try.
        """
        if isinstance(error, FATAL):
            raise error
        if isinstance(error, IncompleteError):  # committed by another attempt with other content: the merge decides
            task.error = str(error)
            return False
        task.failures += 1
        task.alone = task.alone or alone
        task.error = str(error) if isinstance(error, DtpipeError | str) else f"{type(error).__name__}: {error}"
        if task.failures <= self._retries:
            task.not_before_s = time.monotonic() + min(LONGEST_PAUSE_S, 2.0 ** (task.failures - 1))
            self._waiting.append(task)
            return True
        if isinstance(error, StoreError | DeviceMemoryError):
            raise error
        self.failed.append(task)
        return False

    def raise_if_failed(self) -> None:
        """Raises: ErrorBudgetError naming the shards that failed on every try."""
        if not self.failed:
            return
        named = "; ".join(f"shard {task.shard_idx}: {task.error}" for task in self.failed[:3])
        more = f"; and {len(self.failed) - 3} more" if len(self.failed) > 3 else ""
        raise ErrorBudgetError(
            f"{count_of(len(self.failed), 'shard')} failed {count_of(self._retries + 1, 'time')} each "
            f"({named}{more}); all others are committed: mend the cause and run the same command again"
        )
