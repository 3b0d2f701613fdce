"""Rows made ready in threads that run a bounded number of batches ahead of their producer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from dtpipe.extract.shards.producer import PreparedRow, Producer
from dtpipe.manifests.schema import IndexRow

BATCHES_AHEAD = 2  # prepared batches that wait for the producer


class StageSeconds:
    """Seconds of one shard by stage; decode threads add up, so `decode` may exceed the wall clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.values: dict[str, float] = {}

    def add(self, stage: str, since_s: float) -> None:
        """Add the time since `since_s` (time.perf_counter) to a stage."""
        with self._lock:
            self.values[stage] = round(self.values.get(stage, 0.0) + time.perf_counter() - since_s, 6)


class BatchQueue:
    """Prepared rows in batches, in order; preparing runs BATCHES_AHEAD batches ahead of what was taken."""

    def __init__(
        self,
        producer: Producer,
        batch_size: int,
        pool: ThreadPoolExecutor,
        rows: Sequence[IndexRow],
        seconds: StageSeconds,
    ) -> None:
        self._producer, self._pool, self._seconds = producer, pool, seconds
        self._batches = iter([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])
        self._waiting: deque[Sequence[Future[PreparedRow]]] = deque()
        for _ in range(BATCHES_AHEAD):
            self._submit()

    def _submit(self) -> None:
        """Start preparing one more batch, if there is one."""
        rows = next(self._batches, None)
        if rows is not None:
            self._waiting.append([self._pool.submit(self._prepare, index) for index in rows])

    def _prepare(self, index: IndexRow) -> PreparedRow:
        started_s = time.perf_counter()
        prepared = self._producer.prepare(index)
        self._seconds.add("decode", started_s)
        return prepared

    def take(self) -> list[PreparedRow] | None:
        """The next batch, waiting for it; None after the last."""
        if not self._waiting:
            return None
        batch = [future.result() for future in self._waiting[0]]
        self._waiting.popleft()
        self._submit()
        return batch

    def close(self) -> None:
        """Cancel what has not begun."""
        for futures in self._waiting:
            for future in futures:
                future.cancel()
