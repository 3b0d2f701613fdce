"""The one live line of a terminal: what, a bar, counts, then the texts that the width has room for.

One rule: a text is shown whole or not at all. The bar is kept, and the first texts (rate, time left) go last.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

LEAST_BAR, MOST_BAR = 4, 30
GAP = "  "
_REFRESHES_A_SECOND = 8
_DUMB = ("dumb", "unknown")


@dataclass(frozen=True)
class Moment:
    """What a line says at one time."""

    label: str
    done: int = 0
    total: int | None = None
    """None: nobody knows how much there is, and the bar swings."""
    texts: tuple[str, ...] = ()
    """What is most telling first."""

    @property
    def counts(self) -> str:
        """`12/100`; nothing where the total is unknown."""
        return "" if self.total is None else f"{self.done}/{self.total}"


@dataclass(frozen=True)
class FittedLine:
    """A moment in a number of columns."""

    label: str
    bar: int
    """Columns of the bar."""
    text: str
    """What stands behind it."""

    def __len__(self) -> int:
        return len(self.label) + 1 + self.bar + (1 + len(self.text) if self.text else 0)


def fitted(moment: Moment, columns: int) -> FittedLine:
    """The moment in at most so many columns: texts that have no room are left out from the end, the bar shrinks to
    `LEAST_BAR`, and a label that is too long for all that is cut."""
    texts = [text for text in (moment.counts, *moment.texts) if text]
    wanted = min(MOST_BAR, max(LEAST_BAR, columns // 6))
    kept = texts[:1]
    for text in texts[1:]:
        longer = GAP.join([*kept, text])
        if len(FittedLine(moment.label, LEAST_BAR, longer)) > columns:
            break
        kept.append(text)
    line = FittedLine(moment.label, LEAST_BAR, GAP.join(kept))
    over = len(line) - columns
    if over > 0:  # not even the first has room
        return FittedLine(moment.label[: max(0, len(moment.label) - over)], LEAST_BAR, line.text)
    return FittedLine(moment.label, min(wanted, LEAST_BAR - over), line.text)


def plain_line(moment: Moment) -> str:
    """The moment in a log file, whatever its width."""
    return f"{moment.label}: " + GAP.join(text for text in (moment.counts, *moment.texts) if text)


class Screen:
    """The terminal's last line, which belongs to the job that took it last; the others wait."""

    def __init__(self) -> None:
        self._jobs: list[Callable[[], Moment]] = []
        self._live: Live | None = None
        self._lock = threading.RLock()

    def take(self, job: Callable[[], Moment]) -> None:
        """Show a job until it is dropped or another one is taken; `job` is asked several times a second."""
        with self._lock:
            self._jobs.append(job)
            if self._live is None:
                self._live = _live(self)
                self._live.start(refresh=True)
            else:
                self._live.refresh()

    def drop(self, job: Callable[[], Moment], last: Moment | None) -> None:
        """Show a job no more; how it ended is left on the terminal, if that is given."""
        with self._lock:
            live = self._live
            if live is None or job not in self._jobs:
                return
            self._jobs.remove(job)
            if not self._jobs:
                self._live = None
                live.stop()
            if last is not None:
                live.console.print(_Line(last))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if jobs := self._jobs:
            yield from _Line(jobs[-1]()).__rich_console__(console, options)


SCREEN = Screen()


@dataclass(frozen=True)
class _Line:
    """A moment as rich draws it."""

    moment: Moment

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.segment import Segment
        from rich.style import Style

        line = fitted(self.moment, options.max_width - 1)  # a full line would wrap in some terminals
        yield Segment(f"{line.label} ", Style(bold=True))
        total = None if self.moment.total is None else float(max(1, self.moment.total))
        bar = ProgressBar(total, min(float(self.moment.done), total or 0.0), line.bar, pulse=total is None)
        yield from (part for part in console.render(bar, options.update(width=line.bar)) if part.text != "\n")
        yield Segment(f" {line.text}")
        yield Segment.line()


def has_live_line() -> bool:
    """True where a line of stderr can be drawn again and again: a terminal that is not dumb."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in _DUMB


def _live(screen: Screen) -> Live:
    from rich.console import Console as RichConsole
    from rich.live import Live

    console = RichConsole(stderr=True, file=sys.stderr)
    return Live(
        screen,
        console=console,
        transient=True,
        redirect_stdout=False,  # results are not the line's affair
        refresh_per_second=_REFRESHES_A_SECOND,
        vertical_overflow="crop",
    )


def split_texts(text: str) -> Sequence[str]:
    """The texts in a sentence of them, which two spaces keep apart."""
    return [part for part in text.split(GAP) if part]
