"""What long work is at, and how far it has come, for whoever shows it: `pipeline.cli.console` looks here.

One rule: work says this and knows nobody who listens, so that it may be said anywhere, and costs nothing unseen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")
_active: list[Phase] = []


@dataclass(eq=False)
class Phase:
    """One piece of work that is going on."""

    what: str
    """In a few words: `reading features`."""
    total: int | None = None
    """Units there are; None where nobody knows."""
    done: int = 0
    started_s: float = field(default_factory=lambda: time.monotonic())

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self.started_s


@contextmanager
def phase(what: str, total: int | None = None) -> Iterator[Phase]:
    """Say what goes on inside; what is said inside that stands before it."""
    begun = Phase(what, total)
    _active.append(begun)
    try:
        yield begun
    finally:
        _active.remove(begun)


def counted(items: Iterable[_T], total: int, what: str) -> Iterator[_T]:
    """The items, counted as they are done with."""
    with phase(what, total) as begun:
        for item in items:
            yield item
            begun.done += 1


def active_phases() -> tuple[Phase, ...]:
    """What goes on in this process, the innermost last."""
    return tuple(_active)
