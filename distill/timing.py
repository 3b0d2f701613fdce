"""Where the time of a training loop goes, and stopping it by a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Stopwatch:
    """Seconds by activity. On a GPU work is queued, so an activity is charged until the next synchronisation."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, activity: str) -> Iterator[None]:
        """Charge the block to an activity."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start

    def waits(self, activity: str, items: Iterable[T]) -> Iterator[T]:
        """Charge the wait for each item to an activity."""
        iterator = iter(items)
        while True:
            with self.time(activity):
                item = next(iterator, None)
            if item is None:
                return
            yield item


@dataclass
class StopRequest:
    """Which signal, if any, asked to stop."""

    signal: signal.Signals | None = None


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that the loop answers between steps; a second one acts at once.

    Outside the main thread Python allows no handlers, so there signals keep what they did.
    """
    request = StopRequest()
    previous: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
