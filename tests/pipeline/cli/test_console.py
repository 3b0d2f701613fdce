"""Numbers for people, tables, progress in a log file."""

from __future__ import annotations

import json

import pytest

from dtpipe.manifests.phases import phase
from dtpipe.pipeline.cli.console import Console, ProgressLine, format_bytes, format_seconds


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (99_960_000, "100 MB"),
        (999_499_999, "999 MB"),
        (3e16, "30 PB"),
    ],
)
def test_bytes_are_three_digits_and_a_unit(size: float, text: str) -> None:
    assert format_bytes(size).replace("30.0", "30") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7800, "2 h 10 min"),
        (3600 * 52, "2 d 4 h"),
    ],
)
def test_seconds_are_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_table_aligns_words_left_and_numbers_right(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(("name", "IoU"), [("raw", "0.1"), ("distilled", "10.25")])
    assert capsys.readouterr().out.splitlines() == ["name         IoU", "raw          0.1", "distilled  10.25"]


def test_json_prints_one_document_and_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.result("text")
    console.pairs({"a": 1})
    console.note("log")
    console.document({"a": 1})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == "log\n"


def test_progress_without_a_terminal_is_few_lines_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("extract", terminal=False, every_s=1000) as line:
        for done in range(1, 101):
            line.update(done, 100, f"{done} img/s")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["extract: 100/100  100 img/s"]
    assert captured.out == ""


def test_progress_of_a_stopped_job_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), ProgressLine("extract", terminal=False, every_s=1000) as line:
        line.update(30, 100, "1 img/s")
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["extract: 30/100  1 img/s"]


def test_progress_in_a_terminal_shows_events_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("extract", terminal=True) as line:
        line.update(1, 2, "5.0 img/s")
        line.event("worker 1 died [0]; shard 3 goes back")
        line.update(2, 2, "5.0 img/s")
    assert "worker 1 died [0]; shard 3 goes back" in capsys.readouterr().err


def test_a_job_that_another_one_ran_inside_is_not_said_to_be_starting() -> None:
    with ProgressLine("eval", terminal=False) as outer:
        assert outer.now().texts[0] == "starting"
        with ProgressLine("eval", terminal=False) as inner:
            inner.update(1, 2, "5.0 img/s")
        assert outer.now().texts[0] == "working"


def test_a_job_is_not_said_to_be_starting_after_a_phase() -> None:
    with ProgressLine("distill", terminal=False) as line:
        with phase("opening the data"):
            assert line.now().texts[0] == "opening the data"
        assert line.now().texts[0] == "working"


def test_a_job_of_many_small_ones_tells_a_log_file_of_no_end_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("eval", terminal=False, every_s=1000, tell_end=False) as line:
        for training in range(5):
            line.update(6, 6, f"training {training}")
    assert capsys.readouterr().err.splitlines() == ["eval: 6/6  training 4"]
