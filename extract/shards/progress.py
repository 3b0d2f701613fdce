"""What a running extraction says about itself.

Numbers and sentences only; how they look on a terminal is the command line's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dtpipe.extract.shards.timeline import Stalls

RATE_WINDOW_S = 30.0


@dataclass(frozen=True)
class Progress:
    """One moment of a run. Rates are of this run only; counts include what earlier runs committed."""

    shards_done: int
    shards_total: int
    samples_done: int  # committed
    samples_total: int
    samples_encoded: int  # by the teacher, those of shards that are not written yet included
    num_bad: int
    size_bytes: int  # committed by this run
    elapsed_s: float
    throughput_img_s: float  # images encoded per second over the last half minute
    throughput_mb_s: float  # committed megabytes per second over this run
    eta_s: float | None  # None until there is a rate
    workers: int
    stalls: Mapping[str, Stalls] = field(default_factory=dict)
    """Where the time of this run's workers went so far, by their names."""
    message: str | None = None
    """An event worth a line of its own: a worker that died, a shard that is tried again, a node that joined."""


OnExtractProgress = Callable[[Progress], None]


@dataclass
class ProgressMeter:
    """Counts what happens and hands `Progress` to a callback; not thread-safe, one driver owns it."""

    shards_total: int
    samples_total: int
    shards_done: int = 0
    samples_done: int = 0
    num_bad: int = 0
    on_progress: OnExtractProgress | None = None
    workers: int = 0
    size_bytes: int = 0
    _encoded: int = 0  # samples encoded by this run, in flight included
    _committed: int = 0  # by this run
    _stalls: dict[str, Stalls] = field(default_factory=dict)
    _started_s: float = field(default_factory=time.monotonic)
    _ready_s: float | None = None
    _window: list[tuple[float, int]] = field(default_factory=list)

    def committed(self, num_rows: int, num_bad: int, size_bytes: int) -> None:
        """Count one shard that is now committed."""
        self.shards_done += 1
        self.samples_done += num_rows
        self.num_bad += num_bad
        self.size_bytes += size_bytes
        self._committed += num_rows
        self.encoded(self._committed)

    def encoded(self, num_rows: int, stalls: Mapping[str, Stalls] | None = None) -> None:
        """Note how many samples this run has encoded so far, shards in flight included, and where time went."""
        self._encoded = max(self._encoded, num_rows)
        self._stalls |= stalls or {}

    def worker_ready(self) -> None:
        """Note that a worker has its teacher loaded; the first one starts the clock of `working_s`."""
        if self._ready_s is None:
            self._ready_s = time.monotonic()
            # the seconds before say nothing about the rate
            self._window[:] = [(self._ready_s - self._started_s, self._encoded)]

    @property
    def working_s(self) -> float:
        """Seconds since the first worker was ready."""
        return 0.0 if self._ready_s is None else time.monotonic() - self._ready_s

    def report(self, message: str | None = None) -> None:
        """Call the callback with the present moment."""
        if self.on_progress is not None:
            self.on_progress(self.now(message))

    def now(self, message: str | None = None) -> Progress:
        """The present moment as a value."""
        elapsed_s = time.monotonic() - self._started_s
        rate = self._rate(elapsed_s)
        encoded = min(self.samples_total, self.samples_done - self._committed + self._encoded)
        left = self.samples_total - encoded
        return Progress(
            shards_done=self.shards_done,
            shards_total=self.shards_total,
            samples_done=self.samples_done,
            samples_total=self.samples_total,
            samples_encoded=encoded,
            num_bad=self.num_bad,
            size_bytes=self.size_bytes,
            elapsed_s=elapsed_s,
            throughput_img_s=rate,
            throughput_mb_s=self.size_bytes / 1e6 / max(elapsed_s, 1e-9),
            eta_s=left / rate if rate > 0 else None,
            workers=self.workers,
            stalls=dict(self._stalls),
            message=message,
        )

    def _rate(self, elapsed_s: float) -> float:
        """Images per second since the oldest moment inside the window."""
        self._window.append((elapsed_s, self._encoded))
        while len(self._window) > 2 and self._window[1][0] < elapsed_s - RATE_WINDOW_S:
            self._window.pop(0)
        then_s, then = self._window[0]
        return (self._encoded - then) / (elapsed_s - then_s) if elapsed_s > then_s else 0.0
