"""Several processes train one teacher as one process would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.export import TRAIN_TEACHER
from parts.ddpm_training import noise_images, tiny_teacher, train
from parts.ranks import fork_ranks
from parts.settings import changed


@pytest.fixture
def config(tmp_path: Path) -> TrainTeacherConfig:
    """Clipping and AdamW would hide a wrong scale of the gradient; its moments do not."""
    classes: dict[str, Any] = {"class_conditional": True, "label_dropout": 0.3}
    return tiny_teacher(tmp_path / "two", log_every=1, grad_clip=1e6, **classes)


def moments(config: TrainTeacherConfig) -> dict[int, torch.Tensor]:
    """The optimiser's mean gradients, which grow with the gradient, as its steps do not."""
    state = load_checkpoint(Path(config.run.out) / "last.pt", TRAIN_TEACHER)["optimizer"]["state"]
    return {parameter: values["exp_avg"] for parameter, values in state.items()}


def test_two_processes_take_the_steps_of_one(config, tmp_path):
    """Three images a step: one process computes one of them, the other two."""
    one = changed(config, out=str(tmp_path / "one"))
    train(one)

    def call(_rank: int) -> list[object]:
        result = train(config)
        return [result.step, result.finished, result.rank]

    assert fork_ranks(call, tmp_path, 2) == [[6, True, 0], [6, True, 1]]
    losses = [[line["loss"] for line in read_metrics(Path(each.run.out))] for each in (config, one)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    assert (Path(config.run.out) / "samples.png").exists()
    expected = moments(one)
    for parameter, values in moments(config).items():
        torch.testing.assert_close(values, expected[parameter], rtol=1e-2, atol=1e-5)


def test_processes_that_see_different_images_are_refused(config, tmp_path):
    answers = fork_ranks(lambda rank: train(config, noise_images(config, 8 - 3 * rank)).step, tmp_path, 2)
    assert [answer[0] for answer in answers] == ["ConfigError"] * 2
    assert "the processes found different images ([8, 5] of them)" in answers[1][1]


def test_more_processes_than_images_in_a_batch_are_refused(config, tmp_path):
    answers = fork_ranks(lambda _: train(changed(config, batch_size=1)).step, tmp_path, 2)
    assert [answer[0] for answer in answers] == ["ConfigError"] * 2
    assert "batch_size is 1, too few for 2 processes" in answers[0][1]
