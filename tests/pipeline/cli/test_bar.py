"""The live line: what a terminal of some width shows, drawn by the real command in a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtpipe.manifests.phases import counted, phase
from dtpipe.pipeline.cli.bar import LEAST_BAR, Moment, fitted, plain_line, split_texts
from dtpipe.pipeline.cli.console import ProgressLine, phase_moment

TRAINING = (
    "412.3 img/s  ETA 3 h 10 min  epoch 12/100  loss 1.8101  mse 0.5989  at 0.1211  R2 l2 0.31  l3 0.22  lr 2.50e-03"
)
BAR = "━╸╺"


@pytest.mark.parametrize("columns", [60, 80, 130])
@pytest.mark.parametrize("label", ["eval", "train-teacher"])
def test_count_rate_time_left_and_bar_are_kept_and_no_text_is_cut(label: str, columns: int) -> None:
    texts = split_texts(TRAINING)
    line = fitted(Moment(label, 12000, 36000, tuple(texts)), columns - 1)
    shown = split_texts(line.text)
    assert len(line) < columns and line.bar >= LEAST_BAR and line.label == label
    assert shown[:3] == ["12000/36000", "412.3 img/s", "ETA 3 h 10 min"]
    assert shown[1:] == texts[: len(shown) - 1]
    assert len(shown) == {60: 3, 80: 4, 130: 8}[columns] + (label == "eval" and columns > 60)


def test_what_a_terminal_of_a_few_columns_shows_fits_too() -> None:
    for columns in range(12, 60):
        line = fitted(Moment("train-teacher", 12, 36, ("4.0 img/s", "ETA 5 s")), columns)
        assert len(line) <= columns and line.bar >= LEAST_BAR and line.text.startswith("12/36")


def test_a_log_has_all_texts_on_one_line() -> None:
    line = plain_line(Moment("distill", 1, 2, ("4.0 img/s", "ETA 5 s", "loss 1.0")))
    assert line == "distill: 1/2  4.0 img/s  ETA 5 s  loss 1.0"


def test_a_phase_counts_its_items_and_says_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line = ProgressLine("eval", terminal=False)
    assert line.now().texts == ("starting", "0 s")
    with phase("knn of teacher"):
        now[0] = 107.0
        assert line.now() == Moment("eval", 0, None, ("knn of teacher", "7 s"))
        items = counted([1, 2, 3, 4], 4, "images")
        assert next(items) == 1
        now[0] = 109.0
        assert next(items) == 2  # the first is done with after two seconds
        assert line.now() == Moment("eval", 1, 4, ("0.5/s", "ETA 6 s", "images", "knn of teacher"))
        items.close()
        assert line.now().texts[0] == "knn of teacher"
    assert line.now().texts[0] == "working"


def test_a_log_is_told_of_a_phase_that_lasts_and_not_of_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dtpipe.pipeline.cli.console._LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("dtpipe.pipeline.cli.console.PHASE_AFTER_S", 0.1)
    with ProgressLine("eval", terminal=False, every_s=1000):
        with phase("opening"):
            pass
        with phase("reading"), phase("images", 7):
            time.sleep(0.3)
    assert capsys.readouterr().err.splitlines() == ["eval: 0/7  images  0 s  reading"]


@contextmanager
def terminal(*words: str, columns: int) -> Iterator[tuple[int, Callable[[int], None], Callable[[float], list[str]]]]:
    """A command in a pseudo-terminal: its process, what changes the width, and what gives the frames until a time."""
    pid, end = pty.fork()
    if pid == 0:
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execvpe(words[0], words, {**environment, "TERM": "xterm-256color"})

    def resize(width: int) -> None:
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def frames(seconds: float) -> list[str]:
        until, seen = time.monotonic() + seconds, b""
        while (left := until - time.monotonic()) > 0:
            if not select.select([end], [], [], left)[0]:
                break
            try:
                part = os.read(end, 65536)
            except OSError:  # it is over
                break
            if not part:
                break
            seen += part
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode(errors="replace"))
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]

    resize(columns)
    try:
        yield pid, resize, frames
    finally:
        os.close(end)


def bar_of(line: str) -> int:
    """Columns of the bar."""
    return sum(line.count(mark) for mark in BAR)


def test_a_command_in_a_terminal_is_fitted_to_its_width_and_ctrl_c_says_what_is_whole(tmp_path: Path) -> None:
    """`dtpipe demo` while it draws its scenes: something at once, then counts, in three widths."""
    words = (sys.executable, "-m", "dtpipe.pipeline.cli.main", "demo", "--out", str(tmp_path / "demo"))
    with terminal(*words, "--num-images", "20000", columns=130) as (pid, resize, frames):
        drawn: list[str] = []
        for _ in range(200):
            drawn += frames(0.3)
            if any("ETA" in line for line in drawn):
                break
        assert "starting" in next(line for line in drawn if line.startswith("demo "))
        for columns in (130, 80, 60):
            resize(columns)
            shown: list[str] = []
            fitting = 0
            while len(shown) < fitting + 3:
                assert len(shown) < 100, f"nothing fits {columns} columns: {shown[-3:]}"
                shown += [line for line in frames(0.2) if line.startswith("demo ")]
                fitting = next((idx for idx, line in enumerate(shown) if bar_of(line) <= columns // 6), len(shown))
            for line in shown[fitting:]:
                assert len(line) < columns and LEAST_BAR <= bar_of(line) <= columns // 6
                assert re.search(r" \d+/20000  [0-9.]+/s  ETA .+?(  digit scenes)?$", line), line
        os.kill(pid, signal.SIGINT)
        last = frames(20)
        assert last[-1] == (
            "error: stopped by SIGINT; the steps that are finished are kept; run the same command to go on"
        )
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


def test_phase_moment_of_nothing_done_says_how_long_it_has_been_going_on() -> None:
    with phase("images", 9) as begun:
        assert phase_moment("eval", (begun,)) == Moment("eval", 0, 9, ("images", "0 s"))
