"""Held-out images go through a network in passes of bounded size, and are scored all the same."""

from __future__ import annotations

import pytest

from dtpipe.distill.downstream.tuned import scoring
from dtpipe.distill.downstream.tuned.base import TaskNetwork
from dtpipe.distill.downstream.tuned.scoring import in_passes, score_network
from dtpipe.distill.downstream.tuned.trainer import Tuning
from parts.line import CPU
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
    scores = score_network(tuning.job.task, network, test, tuning.config)
    assert seen == [2, 2, 1]
    assert scores.value == pytest.approx(expected.value, abs=1e-3)  # a pixel at one half may fall to either side
