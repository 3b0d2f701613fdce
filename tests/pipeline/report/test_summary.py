"""What stands on top of a run's page: against random initialisation in deviations, when, how long and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.pipeline.report.history import machine, record_command
from dtpipe.pipeline.report.summary import against_random, context_of, training_seconds
from dtpipe.pipeline.report.tasks.results import Cell, TaskResult
from dtpipe.pipeline.report.training import read_run_config


def result_of(own: list[float], other: list[float]) -> TaskResult:
    arms = {
        "random initialisation": {5: Cell({0: 9.0}), 20: Cell(dict(enumerate(other)))},
        "distilled": {5: Cell({0: 0.0}), 20: Cell(dict(enumerate(own)))},
    }
    return TaskResult(Path("probe.json"), "probe", "accuracy", 40, arms)


def test_better_and_worse_are_told_in_deviations_of_the_seeds_from_most_labels() -> None:
    own, other = [0.52, 0.55, 0.58], [0.40, 0.41, 0.45]
    deviations = (np.mean(own) - np.mean(other)) / np.sqrt((np.var(own, ddof=1) + np.var(other, ddof=1)) / 2)
    ((better, said),) = against_random(result_of(own, other))
    assert better and said.startswith("distilled is better than random initialisation at probe from 20 labelled images")
    assert said.endswith(f"accuracy 0.550 against 0.420, {deviations:.1f} standard deviations of the seeds.")
    ((better, said),) = against_random(result_of(other, own))
    assert not better and "is worse than" in said


def test_an_interval_that_holds_zero_is_neither_better_nor_worse() -> None:
    """Paired by seed: a small difference that all seeds have is seen, a larger one of some is not."""
    ((not_worse, said),) = against_random(result_of([0.50, 0.30, 0.46], [0.40, 0.45, 0.40]))
    assert not_worse and said.startswith("distilled is not seen to differ from random initialisation at probe from 20")
    ((better, said),) = against_random(result_of([0.41, 0.62, 0.53], [0.40, 0.60, 0.51]))
    assert better and "is better than" in said and "0.2 standard deviations" in said


def test_one_seed_says_nothing_of_chance() -> None:
    ((better, said),) = against_random(result_of([0.5], [0.4]))
    assert better and said.endswith("one seed, which says nothing of chance.")


def test_the_context_is_of_the_runs_own_records(small_run: Path, tmp_path: Path) -> None:
    metrics, settings = read_metrics(small_run), read_run_config(small_run)
    record_command(tmp_path)
    context = context_of(tmp_path, settings, metrics)
    assert list(context) == ["trained", "duration", "hardware", "versions"]
    assert context["hardware"] == machine() and "CPU core" in machine()
    assert context["versions"].startswith("dtpipe ") and ", torch " in context["versions"]
    assert "hardware" not in context_of(tmp_path / "none", settings, metrics)


def test_a_duration_is_the_sum_of_its_lines() -> None:
    lines = [{"step": 10, "throughput_img_s": 20.0}, {"step": 30, "throughput_img_s": 40.0}]
    assert training_seconds(lines, 8) == pytest.approx(10 * 8 / 20 + 20 * 8 / 40)
