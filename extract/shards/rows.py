"""Rows made ready in threads that run a bounded number of batches ahead of their producer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from dtpipe.extract.shards.producer import PreparedRow, Producer
from dtpipe.extract.shards.timeline import ShardClock
from dtpipe.manifests.schema import IndexRow

BATCHES_AHEAD = 2  # prepared batches that wait for the producer


class BatchQueue:
    """Prepared rows in batches, in order; preparing runs BATCHES_AHEAD batches ahead of what was taken."""

    def __init__(
        self,
        producer: Producer,
        batch_size: int,
        pool: ThreadPoolExecutor,
        rows: Sequence[IndexRow],
        clock: ShardClock,
    ) -> None:
        self.batch_size = batch_size
        self._producer, self._pool, self._clock = producer, pool, clock
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
        """One row; what it does not say of its time is decoding."""
        started_s = time.perf_counter()
        prepared = self._producer.prepare(index)
        known = sum(prepared.seconds.values())
        rest = max(0.0, time.perf_counter() - started_s - known)
        self._clock.add({**prepared.seconds, "decode": prepared.seconds.get("decode", 0.0) + rest})
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
