"""Held-out images go through a network in passes of bounded size, by one process at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtpipe.distill.downstream.tuned import run as run_module
from dtpipe.distill.downstream.tuned import scoring
from dtpipe.distill.downstream.tuned.base import TaskNetwork
from dtpipe.distill.downstream.tuned.run import tune
from dtpipe.distill.downstream.tuned.scoring import in_passes, score_network
from dtpipe.distill.downstream.tuned.trainer import Tuning
from dtpipe.manifests.errors import DeviceMemoryError, LockHeldError
from dtpipe.manifests.store import hold
from parts.line import CPU
from parts.ranks import fork_ranks
from parts.tuning import bright_halves, tune_config, tune_job


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1] * 7, [[1, 1, 1], [1, 1, 1], [1]]),
        ([4, 6, 1, 1], [[4, 6], [1, 1]]),
        ([11, 1, 12, 10, 1], [[11], [1], [12], [10], [1]]),
    ],
)
def test_a_pass_holds_a_number_of_images_and_pixels(sizes, expected, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "PASS_PX", 10)
    assert list(in_passes(sizes, 3, lambda size: size)) == expected


def test_scores_of_small_passes_are_those_of_one(monkeypatch) -> None:
    test = bright_halves(5, 1, masked=True)
    tuning = Tuning(tune_job(tune_config(), bright_halves(4, 0, masked=True), "segment"), CPU)
    network: TaskNetwork = tuning.scored
    expected = score_network(tuning.job.task, network, test, tuning.config)
    seen: list[int] = []
    predict = network.predict
    monkeypatch.setattr(network, "predict", lambda images: seen.append(len(images)) or predict(images))
    monkeypatch.setattr(scoring, "PASS_PX", 2 * 32 * 32)
    heard: list[tuple[int, int]] = []
    scores = score_network(
        tuning.job.task, network, test, tuning.config, on_scored=lambda done, total: heard.append((done, total))
    )
    assert seen == [2, 2, 1] and heard == [(done, 5) for done in range(1, 6)]
    assert scores.value == pytest.approx(expected.value, abs=1e-3)  # a pixel at one half may fall to either side


def test_images_without_room_say_what_to_lower(monkeypatch) -> None:
    tuning = Tuning(tune_job(tune_config(), bright_halves(4, 0, masked=True), "segment"), CPU)
    monkeypatch.setattr(tuning.scored, "predict", lambda _images: torch.empty(1 << 55))
    said = r"scoring: cpu has no memory for 3 images at once \(.*\); the training stays: .* eval.tune.run.score_batch"
    with pytest.raises(DeviceMemoryError, match=said):
        score_network(tuning.job.task, tuning.scored, bright_halves(3, 1, masked=True), tuning.config)


def test_a_training_that_is_scored_by_one_process_is_not_scored_by_another(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hold, "_PATIENCE_S", 0.0)
    job, test = tune_job(tune_config(steps=1)), bright_halves(4, 1)
    said: list[Any] = []

    def second(_rank: int) -> str:
        try:
            tune(job, test, tmp_path / "cell", "cpu")
        except LockHeldError as err:
            return str(err)
        return "scored"

    def scored(*args: Any, **options: Any) -> Any:
        said.extend(fork_ranks(second, tmp_path, 1))
        return score_network(*args, **options)

    monkeypatch.setattr(run_module, "score_network", scored)
    first = tune(job, test, tmp_path / "cell", "cpu")
    assert len(said) == 1 and "another process trains in this folder" in said[0]
    assert tune(job, test, tmp_path / "cell", "cpu").scores == first.scores and len(said) == 1


def test_a_score_that_another_process_wrote_meanwhile_is_read(tmp_path: Path, monkeypatch) -> None:
    """It was trained and scored between the first look and the lock."""
    job, test, looks = tune_job(tune_config(steps=1)), bright_halves(4, 1), []
    first, finished = tune(job, test, tmp_path / "cell", "cpu"), run_module.finished
    monkeypatch.setattr(run_module, "finished", lambda *of: finished(*of) if looks else looks.append(of))
    monkeypatch.setattr(run_module, "score_network", None)
    assert tune(job, test, tmp_path / "cell", "cpu").scores == first.scores and len(looks) == 1
