"""How long dtpipe waits for a store or mount that fails, and what it says meanwhile, by Python's `logging`.

One rule: this is the only place where a request is made again. The clients of stores are told not to.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from dtpipe.manifests.stopping import in_a_hurry
from dtpipe.manifests.store.open_files import ProcessLock
from dtpipe.manifests.store.reasons import Reason, reason_of

_log = logging.getLogger(__name__)
_GLANCE_S = 0.25  # between looks, while waiting, at whether to go on waiting
_T = TypeVar("_T")


@dataclass(frozen=True)
class Patience:
    """Deadlines of operations on a store, in seconds."""

    connect_s: float = 5.0  # for a connection
    silence_s: float = 15.0  # for the next byte of an answer
    attempt_s: float = 60.0  # for one attempt, and longer by its bytes at the slowest rate
    total_s: float = 300.0  # for all attempts, and longer by its bytes at the slowest rate
    first_s: float = 40.0  # for all attempts while the store has never answered this process: a wrong address
    slowest_b_s: float = 1e6  # bytes per second below which a connection counts as broken
    first_pause_s: float = 0.25  # before the second attempt; twice as long before each further one
    longest_pause_s: float = 15.0
    notice_s: float = 30.0  # between two notices about one store


STORE_PATIENCE = Patience()
LOCAL_PATIENCE = Patience(
    silence_s=0.0, total_s=10.0, first_s=10.0
)  # a mount's own client has tried before it reports an error


@dataclass(frozen=True)
class Request:
    """What is asked of which store, for messages."""

    store: str
    verb: str
    what: str

    def __str__(self) -> str:
        return f"{self.verb} {self.what}"


class Trouble:
    """What goes wrong with one store in this process: since when, how often, and when it was last told."""

    def __init__(self) -> None:
        self._writing = ProcessLock()
        self._answered = False
        self._since_s = self._failed_s = self._told_s = float("-inf")
        self._num_failed = self._num_untold = 0

    def end_s(self, start_s: float, patience: Patience) -> float:
        """When an operation that began at `start_s` is given up: the whole store has one deadline, not each request."""
        total_s = patience.total_s if self._answered else patience.first_s
        return min(start_s, self._since_s if self._num_failed else start_s) + total_s

    def failed(self, request: Request, reason: Reason, patience: Patience, next_s: float | None) -> None:
        """Count a failed attempt; the next one is in `next_s`, None when there is none."""
        with self._writing:
            now_s = time.monotonic()
            if not self._num_failed or now_s - self._failed_s > patience.total_s:
                self._since_s, self._num_failed = now_s, 0
            self._failed_s, self._answered = now_s, self._answered or reason.answered
            self._num_failed, self._num_untold = self._num_failed + 1, self._num_untold + 1
            if next_s is None or now_s - self._told_s < patience.notice_s:
                return
            count = f" ({self._num_untold} attempts failed since the last notice)" if self._num_untold > 1 else ""
            end = _clock(self.end_s(now_s, patience) - now_s)
            self._tell(
                f"{request}: {reason.said}; fails since {_clock(self._since_s - now_s)}{count}, "
                f"next attempt in {next_s:.2g} s, given up at {end}"
            )

    def waits(self, request: Request, waited_s: float, limit_s: float, patience: Patience) -> None:
        """Say that an attempt takes long, unless something was said just now."""
        with self._writing:
            if time.monotonic() - self._told_s >= patience.notice_s:
                self._tell(f"{request}: not done after {waited_s:.2g} s; waiting until {_clock(limit_s - waited_s)}")

    def over(self, store: str, patience: Patience) -> None:
        """The store answers; say so where its failure was told and lasted."""
        if self._answered and not self._num_failed:
            return
        with self._writing:
            lasted_s = time.monotonic() - self._since_s
            if self._num_failed and lasted_s >= patience.notice_s / 6:
                self._tell(f"{store} answers again after {lasted_s:.0f} s and {self._num_failed} failed attempts")
            self._num_failed, self._answered = 0, True

    def summary(self) -> str:
        """Since when how many attempts have failed, to end a message with."""
        attempts = "1 attempt" if self._num_failed == 1 else f"{self._num_failed} attempts"
        return f"{attempts} failed since {_clock(self._since_s - time.monotonic())}"

    def _tell(self, text: str) -> None:
        self._told_s, self._num_untold = time.monotonic(), 0
        _log.warning("%s", text)


_troubles: dict[str, Trouble] = {}
_adding = ProcessLock()


def trouble_of(store: str) -> Trouble:
    """What this process knows of a store; all its users share it."""
    with _adding:
        return _troubles.setdefault(store, Trouble())


def patiently(
    attempt: Callable[[float], _T],
    request: Request,
    patience: Patience,
    size_bytes: int = 0,
    ask_size: Callable[[], int] | None = None,
    passes: Callable[[Exception], bool] = lambda err: reason_of(err).passes,
) -> _T:
    """What `attempt` returns; it is called with the seconds it may take, again while its errors may pass.

    `ask_size` gives the bytes of an operation of unknown size, once an attempt ran out of time; `passes` says which
    errors may.
    Raises: what the last attempt raised; with a note of how long was waited, where the error may still pass.
    """
    trouble, start_s, pause_s = trouble_of(request.store), time.monotonic(), patience.first_pause_s
    extra_s = size_bytes / patience.slowest_b_s
    while True:
        left_s = trouble.end_s(start_s, patience) + extra_s - time.monotonic()
        try:
            result = attempt(max(patience.silence_s, min(patience.attempt_s + extra_s, left_s)))
        except Exception as err:
            reason = reason_of(err)
            if not passes(err):
                trouble.over(request.store, patience)
                raise
            if isinstance(err, TimeoutError) and ask_size is not None:
                extra_s, ask_size = _size_or_nothing(ask_size) / patience.slowest_b_s, None
            pause_s = min(pause_s, patience.longest_pause_s) * random.uniform(0.75, 1.0)
            left_s = trouble.end_s(start_s, patience) + extra_s - time.monotonic()
            again = left_s >= pause_s + patience.silence_s and not in_a_hurry()
            trouble.failed(request, reason, patience, pause_s if again else None)
            if not again:
                err.add_note(trouble.summary())
                raise
            _sleep(pause_s)
            pause_s *= 2
        else:
            trouble.over(request.store, patience)
            return result


def _size_or_nothing(ask_size: Callable[[], int]) -> int:
    try:
        return ask_size()
    except Exception:  # the store fails: no more time for it
        return 0


def _sleep(pause_s: float) -> None:
    end_s = time.monotonic() + pause_s
    while (left_s := end_s - time.monotonic()) > 0 and not in_a_hurry():
        time.sleep(min(left_s, _GLANCE_S))


def _clock(from_now_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() + from_now_s))
