"""Where a worker's time goes: what its producer did or waited for, and how long its threads worked meanwhile.

One rule: spans of a shard, and those of a producer, never overlap and leave nothing out, so they add up to the wall
clock. The work of threads runs beside them and says why the producer waited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

STALLS = "stalls"  # key of a manifest's provenance: worker to what `Stalls.record` gives
TEACHING, CODEC, WRITE, WAIT = "teacher", "codec", "write", "wait"
ROWS, CODING, NO_ROOM = "rows", "coding", "room"
PRODUCING = (ROWS, TEACHING, CODEC, CODING, NO_ROOM)
"""Spans in which a shard has the producer: waiting for rows, the network, symbols on the device, waiting for threads
that make bytes, waiting for room in memory."""
OF_ROWS = ("read", "decode", "noise")
"""Work that the producer waits for as `rows`."""
CAUSES = (*OF_ROWS, TEACHING, CODEC, WRITE, WAIT)
"""What the whole time of a worker is divided into, see `Stalls.shares`."""


@dataclass(frozen=True)
class Stalls:
    """Seconds of a worker, or of several. `spans` add up to the time that they were there."""

    spans: Mapping[str, float] = field(default_factory=dict)
    """Of the producer: `PRODUCING`; `write`, idle while a shard was written; `wait`, idle otherwise."""
    work: Mapping[str, float] = field(default_factory=dict)
    """Of threads, beside it: read, decode, noise, compress, digest, store."""
    decode_threads: int = 0
    code_threads: int = 0
    cpus: int = 0
    """Of the machine of one worker."""

    def __add__(self, other: Stalls) -> Stalls:
        return Stalls(
            _sum(self.spans, other.spans),
            _sum(self.work, other.work),
            max(self.decode_threads, other.decode_threads),
            max(self.code_threads, other.code_threads),
            max(self.cpus, other.cpus),
        )

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.spans.values())

    def shares(self) -> dict[str, float]:
        """The time by what it went to, adding up to 1: `CAUSES`. Waiting for rows is divided as the work on them was;
        waiting for threads that make bytes is `codec`, waiting for room in memory `write`.
        """
        spans, total = self.spans, self.seconds
        if not total:
            return {}
        of_rows = {stage: self.work.get(stage, 0.0) for stage in OF_ROWS}
        work = sum(of_rows.values())
        parts = {stage: spans.get(ROWS, 0.0) * value / work if work else 0.0 for stage, value in of_rows.items()}
        parts[TEACHING] = spans.get(TEACHING, 0.0)
        parts[CODEC] = spans.get(CODEC, 0.0) + spans.get(CODING, 0.0)
        parts[WRITE] = spans.get(WRITE, 0.0) + spans.get(NO_ROOM, 0.0)
        parts[WAIT] = spans.get(WAIT, 0.0) + (0.0 if work else spans.get(ROWS, 0.0))
        return {cause: parts[cause] / total for cause in CAUSES}

    def record(self) -> dict[str, Any]:
        """As plain values, rounded."""
        return {
            "seconds": round(self.seconds, 3),
            "shares": {cause: round(share, 4) for cause, share in self.shares().items()},
            "spans": {stage: round(value, 3) for stage, value in self.spans.items()},
            "work": {stage: round(value, 3) for stage, value in self.work.items()},
            **{name: getattr(self, name) for name in ("decode_threads", "code_threads", "cpus")},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `record`."""
        names = ("spans", "work", "decode_threads", "code_threads", "cpus")
        return cls(**{name: record[name] for name in names if name in record})


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {
        name: one.get(name, 0.0) + other.get(name, 0.0) for name in (*one, *(name for name in other if name not in one))
    }


class Timeline:
    """The time of one worker; many threads charge it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, float] = {}
        self._work: dict[str, float] = {}
        self._idle_since_s: float | None = time.perf_counter()  # None while a shard has the producer
        self._idle_writing_s = 0.0  # of the idle time so far, while a shard was written
        self._writers, self._writing_since_s = 0, 0.0

    def charge(self, spans: Mapping[str, float], work: Mapping[str, float]) -> None:
        """Add seconds."""
        with self._lock:
            self._spans, self._work = _sum(self._spans, spans), _sum(self._work, work)

    @contextmanager
    def producing(self) -> Iterator[None]:
        """A shard has the producer; what it does with it is charged from within."""
        with self._lock:
            self._spans = _sum(self._spans, self._idle(time.perf_counter()))
            self._idle_since_s = None
        try:
            yield
        finally:
            with self._lock:
                self._idle_since_s, self._idle_writing_s = time.perf_counter(), 0.0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A shard is being written."""
        with self._lock:
            self._writers += 1
            if self._writers == 1:
                self._writing_since_s = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                if not self._writers and self._idle_since_s is not None:
                    self._idle_writing_s += time.perf_counter() - max(self._writing_since_s, self._idle_since_s)

    def now(self) -> Stalls:
        """Spans and work up to this moment."""
        with self._lock:
            return Stalls(_sum(self._spans, self._idle(time.perf_counter())), dict(self._work))

    def _idle(self, now_s: float) -> dict[str, float]:
        if self._idle_since_s is None:
            return {}
        writing_s = self._idle_writing_s
        if self._writers:
            writing_s += now_s - max(self._writing_since_s, self._idle_since_s)
        return {WRITE: writing_s, WAIT: now_s - self._idle_since_s - writing_s}


class ShardClock:
    """The time of one shard or row, whose thread calls `lap`; other threads add their work."""

    def __init__(self, timeline: Timeline | None = None) -> None:
        self._timeline, self._lock = timeline, threading.Lock()
        self._started_s = self._since_s = time.perf_counter()
        self.spans: dict[str, float] = {}
        self._work: dict[str, float] = {}

    def lap(self, span: str, of_which: Mapping[str, float] | None = None) -> None:
        """Charge the time since the last lap to a span, but for parts of it that are charged to others."""
        now_s = time.perf_counter()
        left_s, parts = now_s - self._since_s, dict[str, float]()
        for other, value in (of_which or {}).items():
            parts[other] = min(value, left_s)  # on a GPU it may have run before
            left_s -= parts[other]
        parts[span] = left_s
        self._since_s, self.spans = now_s, _sum(self.spans, parts)
        if self._timeline is not None:
            self._timeline.charge({name: value for name, value in parts.items() if name in PRODUCING}, {})

    def add(self, work: Mapping[str, float]) -> None:
        """Count seconds of a thread."""
        with self._lock:
            self._work = _sum(self._work, work)
        if self._timeline is not None:
            self._timeline.charge({}, work)

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Count the block as work of its thread."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.add({stage: time.perf_counter() - started_s})

    def record(self) -> dict[str, Any]:
        """`shard`, the wall clock up to the last lap; `spans`, which add up to it; `work`."""
        with self._lock:
            return {
                "shard": round(self._since_s - self._started_s, 6),
                "spans": {stage: round(value, 6) for stage, value in self.spans.items()},
                "work": {stage: round(value, 6) for stage, value in self._work.items()},
            }
