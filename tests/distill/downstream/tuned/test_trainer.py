"""A tuned training is the same in one go, after a kill, in two processes, with any number of readers."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.extractors import random_student
from dtpipe.distill.downstream.tuned.load import load_tuned
from dtpipe.distill.downstream.tuned.run import check_finite, tune
from dtpipe.distill.downstream.tuned.scoring import image_tensor
from dtpipe.distill.downstream.tuned.trainer import TUNED_KIND, Tuning
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.loop import Loop
from dtpipe.distill.engine.progress import Meter
from dtpipe.manifests.errors import ConfigError, DivergedError, PlanChangedError
from parts.ranks import fork_ranks
from parts.tuning import STUDENT, bright_halves, tune_config, tune_job, tune_losses

CPU = torch.device("cpu")
WITHOUT_STATISTICS = {"frozen_norms": True, "head": {"dropout": 0.0}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(folder / "last.pt", TUNED_KIND)
    return {**state["network"], **{f"ema.{name}": value for name, value in (state["ema"] or {}).items()}}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_training_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is random: crops, flips, mixup, CutMix, dropout and stochastic depth."""
    augment = {"scale": [0.5, 1.0], "mixup": 0.8, "cutmix": 1}
    config = tune_config(steps=8, ema_decay=0.9, drop_path=0.2, augment=augment)
    job, test = tune_job(config), bright_halves(4, 1)

    updated = Tuning.updated

    def die(trainer: Tuning, step: int) -> None:
        updated(trainer, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed(_rank: int) -> None:
        monkeypatch.setattr(Tuning, "updated", die)
        tune(job, test, tmp_path / "killed", "cpu")

    assert fork_ranks(killed, tmp_path, 1) == [None]
    assert load_checkpoint(tmp_path / "killed" / "last.pt", TUNED_KIND)["step"] == 4
    resumed, unbroken = (tune(job, test, tmp_path / name, "cpu") for name in ("killed", "unbroken"))
    assert (resumed.resumed_step, unbroken.resumed_step) == (4, 0)
    assert tune_losses(tmp_path / "killed") == tune_losses(tmp_path / "unbroken")
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "unbroken"))
    assert resumed.scores == unbroken.scores


def test_two_processes_take_the_steps_of_one_and_join_their_scores(tmp_path: Path) -> None:
    """Five images a step, so that the shares differ, in micro-batches; without what each draws for itself."""
    config = tune_config(batch_size=5, micro_batch=2, **WITHOUT_STATISTICS)
    job, test = tune_job(config), bright_halves(5, 1)
    one = tune(job, test, tmp_path / "one", "cpu")

    def call(_rank: int) -> list[object]:
        result = tune(job, test, tmp_path / "two", "cpu")
        return [result.rank, result.num_ranks, result.value]

    assert fork_ranks(call, tmp_path, 2) == [[0, 2, one.value], [1, 2, one.value]]
    np.testing.assert_allclose(tune_losses(tmp_path / "two"), tune_losses(tmp_path / "one"), rtol=0, atol=1e-5)
    assert len(list((tmp_path / "two" / "predictions").glob("*.json"))) == 5 + 1  # keys.json


def run_in_memory(trainer: Tuning) -> list[float]:
    """Take all steps without a folder; the loss of each."""
    loop, losses = Loop(trainer), []
    for _ in loop.steps():
        losses.append(loop.meter.losses()["loss"])
        loop.meter = Meter(trainer.watch)
    return losses


def test_reading_processes_change_nothing() -> None:
    losses = []
    for workers in (0, 2):
        config = tune_config(steps=3, augment={"scale": [0.3, 1.0], "policy": "trivial"}, run={"workers": workers})
        torch.manual_seed(0)
        losses.append(run_in_memory(Tuning(tune_job(config), CPU)))
    assert losses[0] == losses[1]


def test_a_finished_training_is_read_and_one_of_other_settings_is_refused(tmp_path: Path) -> None:
    job, test = tune_job(tune_config(steps=2)), bright_halves(4, 1)
    first = tune(job, test, tmp_path, "cpu")
    again = tune(job, test, tmp_path, "cpu")
    assert (again.scores, again.seconds, again.step) == (first.scores, first.seconds, 2)
    assert tune(job, bright_halves(6, 2), tmp_path, "cpu").resumed_step == 2  # scored anew, not trained
    with pytest.raises(PlanChangedError, match=r"eval\.tune\.lr: 0\.003 -> 0\.1"):
        tune(tune_job(tune_config(steps=2, lr=0.1)), test, tmp_path, "cpu")
    with pytest.raises(PlanChangedError, match=r"num_images: 6 -> 4"):
        tune(tune_job(tune_config(steps=2), bright_halves(4, 0)), test, tmp_path, "cpu")
    known = replace(bright_halves(6, 0), target_digests=("labelled", "otherwise", "c", "d", "e", "f"))
    with pytest.raises(PlanChangedError, match=r"images: "):
        tune(tune_job(tune_config(steps=2), known), test, tmp_path, "cpu")
    mirrored = tune_job(tune_config(steps=2, inference={"flips": True}, head={"max_detections": 5}))
    assert tune(mirrored, test, tmp_path, "cpu").resumed_step == 2
    assert load_tuned(tmp_path).config.inference.flips
    assert not load_tuned(tmp_path / "last.pt").config.inference.flips
    relabelled = replace(test, target_digests=("labelled", "otherwise", "c", "d"))
    assert tune(job, relabelled, tmp_path, "cpu").resumed_step == 2
    tune(job, test, tmp_path, "cpu")
    more = tune_config(steps=2, run={"log_every": 7, "save_every": 9})
    assert tune(tune_job(more), test, tmp_path, "cpu").value == first.value


def test_a_frozen_backbone_and_frozen_norms_stay_as_they_were() -> None:
    for changes, kept in (
        ({"backbone_lr": 0.0}, lambda _name: True),
        ({"frozen_norms": True}, lambda name: "running" in name or "batches" in name),
    ):
        job = tune_job(tune_config(steps=2, **changes))
        trainer = Tuning(job, CPU)
        before = {name: value.clone() for name, value in trainer.model.student.state_dict().items()}
        run_in_memory(trainer)
        after = trainer.model.student.state_dict()
        same = {name: torch.equal(before[name], after[name]) for name in before}
        assert all(same[name] for name in same if kept(name))
        assert all(same.values()) == ("backbone_lr" in changes)


def test_frozen_norms_of_random_weights_are_measured_on_training_views_and_others_kept() -> None:
    """By the same network in training mode, whose norms add the statistics of one batch to none."""
    job = tune_job(tune_config(frozen_norms=True, augment={"flip": 0}))
    found = Tuning(job, CPU).model.student.net.state_dict()
    reference = random_student(STUDENT, 0).train()
    for norm in (part for part in reference.modules() if isinstance(part, torch.nn.BatchNorm2d)):
        norm.momentum = None
    reference(torch.stack([image_tensor(job.labelled.image(row)) for row in range(6)]))
    for name, value in reference.net.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    trained = tune_job(tune_config(frozen_norms=True), student=reference.eval())
    kept = Tuning(trained, CPU).model.student.net.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in reference.net.state_dict().items())


def test_samples_of_a_loss_that_is_not_finite_are_named(tmp_path: Path) -> None:
    job = tune_job(tune_config(lr=1e30, steps=20))
    with pytest.raises(DivergedError, match=r"in a batch of 0/.*lower eval\.tune\.lr"):
        tune(job, bright_halves(4, 1), tmp_path, "cpu")


def test_batches_that_norms_cannot_measure_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no statistics of single images.*frozen_norms"):
        Tuning(tune_job(tune_config(micro_batch=1)), CPU)
    Tuning(tune_job(tune_config(micro_batch=1, frozen_norms=True)), CPU)


def test_weights_that_the_last_step_spoiled_are_not_scored() -> None:
    network = torch.nn.Linear(2, 2)
    check_finite(network)
    with torch.no_grad():
        network.bias[1] = torch.inf
    with pytest.raises(DivergedError, match="after the last step bias is not finite; train anew"):
        check_finite(network)
