"""What a person sees: results on stdout, everything else on stderr, one JSON document with `--json`.

A terminal gets a live bar; a log file gets a plain line now and then.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress

PLAIN_EVERY_S = 5.0
QUIET_S = 60.0  # a line that says nothing new is repeated only so often
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


def format_seconds(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
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
    """Progress of one job on stderr: a bar in a terminal, else a plain line every few seconds and at the end."""

    def __init__(self, label: str, terminal: bool | None = None, every_s: float = PLAIN_EVERY_S) -> None:
        self._label = label
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._every_s = every_s
        self._bar: Progress | None = None
        self._printed_at = time.monotonic()
        self._shown = self._pending = ""
        self._complete = False

    def update(self, done: int, total: int, text: str) -> None:
        """`done` of `total` units are ready; `text` says rates and counts."""
        if self._terminal:
            self._draw(done, total, text)
            return
        line = f"{self._label}: {done}/{total}  {text}"
        now = time.monotonic()
        waited_s = now - self._printed_at
        if (done >= total and not self._complete) or (
            waited_s >= self._every_s and (line != self._shown or waited_s >= QUIET_S)
        ):
            self._print(line, now)
        elif not self._complete:
            self._pending = line
        self._complete = done >= total

    def event(self, text: str) -> None:
        """Something worth a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(f"{self._label}: {text}", file=sys.stderr, flush=True)

    def _print(self, line: str, now: float) -> None:
        print(line, file=sys.stderr, flush=True)
        self._printed_at, self._shown, self._pending = now, line, ""

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = _live_bar()
            self._bar.start()
            self._bar.add_task(self._label, total=total, text=text)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._pending:
            self._print(self._pending, time.monotonic())


def _live_bar() -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[text]}")
    return Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=RichConsole(stderr=True))
