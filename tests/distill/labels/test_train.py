"""An interpreter learns what features tell; a training that was killed goes on to the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.optim import warmup_cosine
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.labels.arms import interpreter_predict, score_arm
from dtpipe.distill.labels.config import InterpreterConfig
from dtpipe.distill.labels.data import Places, batches_of
from dtpipe.distill.labels.train import INTERPRET, InterpreterTraining, train_interpreter
from dtpipe.manifests.errors import PlanChangedError
from parts.interpreted import interpreted, interpreter_config
from parts.runs import assert_equal_checkpoints

CPU = torch.device("cpu")


class KilledError(Exception):
    """Stands for a kill: nothing catches it."""


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data, reads = interpreted(), 0
    unbroken = interpreter_config(tmp_path / "unbroken", save_every=3)
    train_interpreter(unbroken, data, {"labelled": "a"})

    def read(row: int, reading: int, flip: bool) -> Mapping[str, Tensor]:
        nonlocal reads
        reads += 1
        if reads > 17:  # in step 6 of 8
            raise KilledError
        return data.read(row, reading, flip)

    broken = interpreter_config(tmp_path / "broken", save_every=3)
    with pytest.raises(KilledError):
        train_interpreter(broken, replace(data, read=read), {"labelled": "a"})
    assert load_checkpoint(tmp_path / "broken" / "last.pt", INTERPRET)["step"] == 3
    network, result = train_interpreter(broken, data, {"labelled": "a"})
    assert (result.resumed_step, result.step, network.training) == (3, 8, False)
    assert_equal_checkpoints(tmp_path / "unbroken" / "last.pt", tmp_path / "broken" / "last.pt", INTERPRET)
    lines = [read_metrics(tmp_path / name) for name in ("unbroken", "broken")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    with pytest.raises(PlanChangedError, match="labelled"):
        train_interpreter(broken, data, {"labelled": "b"})
    with pytest.raises(PlanChangedError, match=r"interpret\.lr"):
        train_interpreter(interpreter_config(tmp_path / "broken", save_every=3, lr=1e-3), data, {"labelled": "a"})


@pytest.mark.parametrize("classes", [False, True])
def test_it_reads_masks_and_classes_off_features(tmp_path: Path, classes: bool) -> None:
    train, test = interpreted(12, 0, classes), interpreted(8, 1, classes)
    config = interpreter_config(tmp_path, epochs=30, lr=2e-2, batch_size=6)
    network, _ = train_interpreter(config, train, {})
    score = score_arm("interpreter", interpreter_predict(network, not classes), test, CPU, 2)
    assert score.value > 0.7, score
    assert set(score.by_class) == {"0", "1"} and len(score.drawn) == 2


def test_every_epoch_takes_each_image_once_and_flips_and_draws_vary() -> None:
    data = interpreted(7)
    places = list(batches_of(data, 3, 12, seed=1, step=0))
    assert [len(batch.rows) for batch in places] == [3, 3, 1] * 4
    for epoch in range(4):
        assert sorted(row for batch in places[3 * epoch : 3 * epoch + 3] for row in batch.rows) == list(range(7))
    assert {flip for batch in places for flip in batch.flips} == {False, True}
    assert {reading for batch in places for reading in batch.readings} == {0, 1}
    assert list(batches_of(data, 3, 12, seed=1, step=5)) == places[5:]
    still = batches_of(replace(data, flips=False, num_readings=1), 3, 12, seed=1, step=0)
    assert {(reading, flip) for batch in still for reading, flip in zip(batch.readings, batch.flips, strict=True)} == {
        (0, False)
    }


def test_the_target_of_a_mirrored_image_is_mirrored() -> None:
    data = interpreted(2)
    batch = Places([0, 1], [0, 1], [True, False]).gather(data, CPU)
    assert torch.equal(batch.truth[0], data.target(0).flip(-1)) and torch.equal(batch.truth[1], data.target(1))
    assert torch.equal(batch.levels["l2"][0], data.read(0, 0, False)["l2"].flip(-1))
    assert torch.equal(batch.levels["l3"][1], data.read(1, 1, False)["l3"])
    assert (data.target(0)[-1] == -1).all()


def test_settings_are_the_papers(tmp_path: Path) -> None:
    """Appendices D.2 and G.2: AdamW 4e-3, decay 0.05, betas 0.9 and 0.95, 100 epochs, 20 of warm-up, 3 x Dice."""
    config = InterpreterConfig.model_validate({"run": {"out": str(tmp_path)}})
    trainer = InterpreterTraining(config, interpreted(), CPU)
    group = trainer.optimizer.param_groups[0]
    assert type(trainer.optimizer).__name__ == "AdamW"
    assert (config.lr, group["betas"], config.dice_weight, config.width, config.dropout) == (
        *(4e-3, (0.9, 0.95), 3.0, 256, 0.1),
    )
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.05}
    assert trainer.course.num_steps == 200
    assert trainer.learning_rate(39) == pytest.approx(4e-3) and trainer.learning_rate(0) == pytest.approx(1e-4)
    assert trainer.learning_rate(120) == warmup_cosine(120, 200, 40, 4e-3)
    assert np.argmax([trainer.learning_rate(step) for step in range(200)]) in (39, 40)


def test_a_short_training_warms_up_for_a_fifth_and_one_that_never_ends_to_is_refused(tmp_path: Path) -> None:
    run = {"run": {"out": str(tmp_path)}}
    short = InterpreterTraining(InterpreterConfig.model_validate({"epochs": 10, **run}), interpreted(), CPU)
    assert short.learning_rate(3) == pytest.approx(4e-3) and short.learning_rate(0) == pytest.approx(1e-3)
    with pytest.raises(ValidationError, match=r"interpret\.warmup_epochs is 20 of 20 epochs; make it smaller"):
        InterpreterConfig.model_validate({"epochs": 20, "warmup_epochs": 20, **run})
