"""What a person sees: results on stdout, everything else on stderr, one JSON document with `--json`.

A terminal gets a live bar; a log file gets a plain line now and then.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from dtpipe.manifests.phases import Phase, active_phases
from dtpipe.pipeline.cli.bar import SCREEN, Moment, has_live_line, plain_line, split_texts

if TYPE_CHECKING:
    from types import TracebackType

    from dtpipe.distill.engine.progress import TrainProgress

PLAIN_EVERY_S = 5.0
QUIET_S = 60.0  # a line that says nothing new is repeated only so often
PHASE_AFTER_S = 1.5  # what is over sooner is not told in a log file
_LOOK_EVERY_S = 0.5
_BETWEEN = "working"  # after a phase, where nothing else tells what is done
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

Note = Callable[[str], None]
"""Takes a remark for the person who waits."""


def say_nothing(_sentence: str) -> None:
    """The note of what was said before, or of a process that is not the first."""


def format_bytes(size: float) -> str:
    """Bytes for people, powers of 1000: `1.5 GB`."""
    for unit in UNITS:
        if abs(size) < 999.5 or unit == UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def format_error(error: float) -> str:
    """A share of a variance for people: `0.0302`, `1.3e-05`, `0`."""
    return f"{error:.4f}" if error >= 5e-4 else f"{error:.1e}" if error else "0"


def format_seconds(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 and seconds != whole else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 172800:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def plain(value: Any) -> Any:
    """Models and dataclasses as what json can write."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "item"):
        return value.item()
    return str(value)


class Console:
    """Where a command prints. With `as_json` only `document` reaches stdout."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def result(self, text: str = "") -> None:
        """One line of the result."""
        if not self.as_json:
            print(text, flush=True)

    def pairs(self, rows: Mapping[str, object]) -> None:
        """Names and values, aligned."""
        width = max((len(name) for name in rows), default=0)
        for name, value in rows.items():
            self.result(f"{name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns as wide as their widest cell; columns of numbers are set flush right."""
        cells = [[str(cell) for cell in row] for row in rows]
        widths = [max(len(column), *(len(row[idx]) for row in cells), 0) for idx, column in enumerate(columns)]
        right = [bool(cells) and all(_is_number(row[idx]) for row in cells) for idx in range(len(columns))]
        for row in [list(columns), *cells]:
            padded = (
                cell.rjust(width) if flush else cell.ljust(width)
                for cell, width, flush in zip(row, widths, right, strict=True)
            )
            self.result("  ".join(padded).rstrip())

    def document(self, value: object) -> None:
        """The one JSON document that `--json` prints; nothing otherwise."""
        if self.as_json:
            print(json.dumps(value, default=plain, indent=2, ensure_ascii=False), flush=True)

    def note(self, text: str) -> None:
        """One line of log."""
        print(text, file=sys.stderr, flush=True)


def _is_number(text: str) -> bool:
    return text in ("", "-") or re.fullmatch(r"[-+]?\d+(\.\d+)?( ± \d+(\.\d+)?)?", text) is not None


class ProgressLine:
    """Progress of one job on stderr, from its beginning on: a bar in a terminal, else a plain line every few seconds
    and at the end.

    Shows what `update` was told last; while there is a phase of `manifests.phases`, that. `tell_end`: a log file gets
    a line about the end too, however soon after the one before.
    """

    def __init__(
        self, label: str, terminal: bool | None = None, every_s: float = PLAIN_EVERY_S, tell_end: bool = True
    ) -> None:
        self._label, self._tell_end = label, tell_end
        self._terminal = has_live_line() if terminal is None else terminal
        self._every_s = every_s
        self._begun = Phase("starting")
        self._told: Moment | None = None
        self._printed_at = time.monotonic()
        self._shown = self._pending = ""
        self._complete = self._drawn = False
        self._over = threading.Event()
        self._looker: threading.Thread | None = None
        self._lock = threading.Lock()

    def update(self, done: int, total: int, text: str) -> None:
        """`done` of `total` units are ready; `text` says rate, time left, and what else there is, two spaces apart.

        A terminal shows as many of these as it has room for, from the first on.
        """
        self._told = Moment(self._label, done, total, tuple(split_texts(text)))
        if self._terminal:
            self._draw()
            return
        with self._lock:
            self._tell(plain_line(self._told), self._tell_end and done >= total)

    def event(self, text: str) -> None:
        """Something worth a line of its own, above the bar."""
        where = "" if self._drawn else f"{self._label}: "
        print(f"{where}{text}", file=sys.stderr, flush=True)

    def now(self) -> Moment:
        """What there is to say at this moment."""
        phases = active_phases()
        if phases:
            self._begun = Phase(_BETWEEN)
            return phase_moment(self._label, phases)
        return self._told or phase_moment(self._label, (self._begun,))

    def _tell(self, line: str, complete: bool) -> None:
        """Print a line of a log, if it is time."""
        now = time.monotonic()
        waited_s = now - self._printed_at
        if (complete and not self._complete) or (
            waited_s >= self._every_s and (line != self._shown or waited_s >= QUIET_S)
        ):
            self._print(line, now)
        elif not self._complete:
            self._pending = line
        self._complete = complete

    def _print(self, line: str, now: float) -> None:
        print(line, file=sys.stderr, flush=True)
        self._printed_at, self._shown, self._pending = now, line, ""

    def _draw(self) -> None:
        if not self._drawn:
            self._drawn = True
            SCREEN.take(self.now)

    def _look(self) -> None:
        """Of a log: print the phase that is going on, soon after it began and then now and again."""
        said: Phase | None = None
        while not self._over.wait(_LOOK_EVERY_S):
            if _entered[-1:] != [self]:
                continue
            phases = active_phases()
            if phases:
                self._begun = Phase(_BETWEEN)
            current = phases[-1] if phases else self._begun if self._told is None else None
            if current is None or current.seconds < PHASE_AFTER_S:
                continue
            line = plain_line(phase_moment(self._label, phases or (self._begun,)))
            waited_s = time.monotonic() - self._printed_at
            often = QUIET_S if current.total is None else self._every_s
            if current is not said or waited_s >= often:
                said = current
                with self._lock:
                    self._print(line, time.monotonic())

    def __enter__(self) -> ProgressLine:
        _entered.append(self)
        if self._terminal:
            self._draw()
        else:
            self._looker = threading.Thread(target=self._look, name="progress", daemon=True)
            self._looker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._looker is not None:
            self._looker.join(timeout=_LOOK_EVERY_S)
        if self in _entered:  # some are only updated
            _entered.remove(self)
        for outer in _entered[-1:]:
            outer._begun = Phase(_BETWEEN)
        if self._drawn:
            self._drawn = False
            SCREEN.drop(self.now, self._told)
        if self._pending:
            self._print(self._pending, time.monotonic())


def speed(progress: TrainProgress) -> str:
    """Rate of a training and the time that is left: to its end, or to its time limit and the step that this is at."""
    left = format_seconds(progress.remaining_s)
    ends = "" if progress.limit_step is None else f" to the time limit, about step {progress.limit_step}"
    return f"{progress.throughput_img_s:.1f} img/s  ETA {left}{ends}"


_entered: list[ProgressLine] = []
"""Jobs that are going on, each inside the one before; the last one tells of phases."""


def phase_moment(label: str, phases: Sequence[Phase]) -> Moment:
    """The innermost phase, with its rate and the time left where it counts, else for how long it has been going on."""
    current, texts = phases[-1], [phase.what for phase in reversed(phases)]
    if current.total is None or current.done == 0:
        return Moment(label, 0, current.total, (texts[0], format_seconds(round(current.seconds)), *texts[1:]))
    rate = current.done / max(current.seconds, 1e-9)
    left = format_seconds(max(0, current.total - current.done) / rate)
    speed = f"{rate:.1f}/s" if rate < 100 else f"{rate:.0f}/s"
    return Moment(label, current.done, current.total, (speed, f"ETA {left}", *texts))
