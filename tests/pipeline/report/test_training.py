"""Curves of a run: losses as they were written, and R² against a constant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.pipeline.report import figures
from dtpipe.pipeline.report.training import level_lines, training_section


def test_r2_is_drawn_as_it_was_logged_over_what_a_constant_has(small_run: Path) -> None:
    metrics = read_metrics(small_run)
    lines = level_lines(metrics)
    assert list(lines) == ["R² by level"] and list(lines["R² by level"]) == ["l2", "l3"]
    steps, values = lines["R² by level"]["l3"]
    assert list(steps) == [line["step"] for line in metrics]
    assert values == [line["r2/l3"] for line in metrics]
    (section,) = training_section(metrics)
    assert section.html.count(">constant<") == 1 and "dashed line, a constant" in section.html


def test_a_run_from_before_there_was_r2_shows_its_errors(small_run: Path) -> None:
    metrics = [
        {name: value for name, value in line.items() if not name.startswith("r2/")} for line in read_metrics(small_run)
    ]
    lines = level_lines(metrics)
    assert lines["squared error by level"]["l2"][1] == [line["mse/l2"] for line in metrics]
    (section,) = training_section(metrics)
    assert "R²" not in section.html and ">constant<" not in section.html


def test_a_run_without_a_regression_shows_the_terms_that_it_has() -> None:
    metrics = [
        {"step": step, "num_steps": 2, "loss": 1.0, "cosine": 1.0, "cosine/l2": 1.0, "lr": 0.1, "throughput_img_s": 1.0}
        for step in (1, 2)
    ]
    assert level_lines(metrics) == {}
    (section,) = training_section(metrics)
    assert "cosine by level" in section.html and "R²" not in section.html and "squared error" not in section.html
    assert "rose to 0.1 at step 1 and" in section.html


@pytest.mark.parametrize(("lowest", "shown"), [(-0.2, True), (-30.0, False)])
def test_zero_is_always_in_sight_and_a_bad_beginning_does_not_flatten_the_rest(lowest: float, shown: bool) -> None:
    svg = figures.curves({"R²": {"l2": ([1, 2], [lowest, 0.3])}}, against=["R²"])
    ticks = [float(text.replace("\u2212", "-")) for text in re.findall(r">([\u2212-]?[0-9.]+)</text>", svg)]
    assert min(ticks) >= -0.5
    assert (min(ticks) > -0.5) == shown
