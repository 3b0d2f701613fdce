"""SIGTERM and SIGINT as a request, in every command: a run brings what it has in hand to a good end and stops.

A second signal hurries it: nothing is waited for any more. A third ends the process.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from dtpipe.manifests.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_active: list[StopRequest] = []


def in_a_hurry() -> bool:
    """True once this process was asked twice to stop: nothing is waited for any more."""
    return any(stop.urgent for stop in _active)


class StopRequest:
    """A context manager that turns signals into flags; outside the main thread it only offers the flags."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.urgent = False  # asked twice
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once a stop was asked for."""
        return self.signal is not None

    def request(self, number: int = signal.SIGTERM) -> None:
        """Ask for a stop, as a signal does."""
        self.urgent = self.requested
        self.signal = number

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  the signature of a handler
        if self.urgent:  # something hangs, such as a read; what was published is whole even after a kill
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.request(number)

    def __enter__(self) -> StopRequest:
        _active.append(self)
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def raise_if_requested(self, where: str, kept: str = "committed shards are kept") -> None:
        """Raises: StoppedError, which says what is `kept`, with exit code 128 + the signal's number."""
        if self.signal is None:
            return
        error = StoppedError(
            f"{where}: stopped by {signal.Signals(self.signal).name}; {kept}, run the same command to go on"
        )
        error.exit_code = 128 + self.signal
        raise error
