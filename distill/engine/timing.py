"""Where the time of a training loop goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

IDLE = "data"  # the activity that is left: the device has nothing to do, since it waits for data


class Stopwatch:
    """Seconds that a device spends on each activity; what is left of the wall clock it waited for data.

    On a GPU, whose work is queued, activities lie between events on its stream, which are read only when asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def time(self, activity: str) -> Iterator[None]:
        """Charge the block to an activity."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((activity, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Seconds by activity since the watch was made; waits for the device."""
        if self._spans and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for activity, start, end in self._spans:
            spent = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            self._seconds[activity] = self._seconds.get(activity, 0.0) + spent
        self._spans.clear()
        idle = time.perf_counter() - self._started - sum(self._seconds.values())
        return {IDLE: max(0.0, idle), **self._seconds}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
