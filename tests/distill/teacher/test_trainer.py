"""A step of a teacher's training against its formulas in float64; runs that stop and go on; what they begin with."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.loop import Loop
from dtpipe.distill.engine.progress import Meter
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.data import TrainImages, draw_batch
from dtpipe.distill.teacher.export import TRAIN_TEACHER
from dtpipe.distill.teacher.trainer import TeacherTraining, loss_weight, train_ddpm
from dtpipe.manifests.errors import ConfigError, DivergedError, LockHeldError, PlanChangedError, StoppedError
from dtpipe.manifests.records.image_digests import TRAIN_IMAGES, image_digest, read_digests
from parts.ddpm_training import FIXTURES, draw_grey, in_memory, noise_images, tiny_teacher, train
from parts.ranks import fork_ranks
from parts.runs import assert_equal_checkpoints
from parts.settings import build, changed

CPU = torch.device("cpu")
BETAS = np.linspace(1e-4, 0.02, 1000)


@pytest.fixture
def config(tmp_path: Path) -> TrainTeacherConfig:
    return tiny_teacher(tmp_path / "teacher")


def trained(config: TrainTeacherConfig, images: TrainImages | None = None) -> tuple[TeacherTraining, Sequence[float]]:
    """A trainer after all its steps, and the loss of each."""
    trainer = TeacherTraining(config, images or noise_images(config), CPU)
    loop, losses = Loop(trainer), []
    for _ in loop.steps():
        losses.append(loop.meter.losses()["loss"])
        loop.meter = Meter(trainer.watch)
    return trainer, losses


def opens_nothing(*_: object) -> TrainImages:
    raise AssertionError("images were opened")


def last(config: TrainTeacherConfig) -> Path:
    return Path(config.run.out) / "last.pt"


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_a_step_follows_the_formulas(weighting):
    """Loss, gradient clipping and AdamW of one step, restated by hand in float64."""
    config = tiny_teacher(batch_size=6, loss_weighting=weighting)
    batch = draw_batch(config, noise_images(config), 0)
    trainer = TeacherTraining(config, noise_images(config), CPU)
    reference = TeacherTraining(config, noise_images(config), CPU).unet.double()
    expected = torch.zeros((), dtype=torch.float64)
    for clean, timestep, noise in zip(
        batch.clean.double(), batch.timesteps.tolist(), batch.noise.double(), strict=True
    ):
        kept = 1.0
        for beta in BETAS[: timestep + 1]:
            kept *= 1 - beta
        snr = kept / (1 - kept)
        weight = min(snr, 5.0) / snr if weighting == "min_snr" else 1.0
        predicted = reference((kept**0.5 * clean + (1 - kept) ** 0.5 * noise)[None], timestep).sample[0]
        expected = expected + weight * ((predicted - noise) ** 2).mean() / 6
    gradients = torch.autograd.grad(expected, list(reference.parameters()))
    before = {name: value.detach().clone() for name, value in trainer.unet.named_parameters()}
    loop = Loop(trainer)
    next(loop.steps())
    assert abs(loop.meter.losses()["loss"] - expected.item()) < 1e-5 * expected.item()
    scale = min(1.0, config.grad_clip / sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5)
    for (name, value), gradient in zip(trainer.unet.named_parameters(), gradients, strict=True):
        # AdamW's first step is lr * sign, where the gradient exceeds eps and rounding
        clear = (gradient * scale).abs() > 1e-5
        moved = (value.detach() - before[name])[clear].double()
        step = -trainer.learning_rate(0) * (gradient * scale / ((gradient * scale).abs() + 1e-8))[clear]
        torch.testing.assert_close(moved, step, rtol=2e-2, atol=1e-7)


def test_min_snr_weighs_early_timesteps_down_and_late_ones_not():
    kept = torch.from_numpy(np.cumprod(1 - BETAS))
    weights = loss_weight(tiny_teacher(loss_weighting="min_snr"), kept)
    assert weights[0] < 1e-3  # SNR 9999: 5 / 9999
    assert (weights.diff() >= 0).all()
    assert (weights[kept < 5 / 6] == 1).all()  # SNR below 5


def test_training_learns():
    """On one image the loss falls well below one, the loss of a network that predicts nothing."""
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[:, :8] = 200
    losses = trained(tiny_teacher(steps=150, batch_size=8, lr=3e-3), in_memory(pixels))[1]
    assert np.mean(losses[:5]) > 0.8
    assert np.mean(losses[-20:]) < 0.35


def test_the_network_learns_from_its_class():
    """Two classes of one grey each at the noisiest timesteps: only with its class does a network's loss fall far."""
    pixels = np.repeat(np.array([0, 255], np.uint8), 8 * 16 * 16 * 3).reshape(16, 16, 16, 3)
    images = in_memory(pixels, np.repeat([0, 1], 8), ("black", "white"))
    config = tiny_teacher(steps=60, batch_size=8, lr=5e-3, class_conditional=True, label_dropout=0.5, flip=False)
    before = TeacherTraining(config, images, CPU).unet.get_parameter("class_embedding.weight").detach()
    unet = trained(config, images)[0].unet
    noise = torch.from_numpy(np.random.Generator(np.random.Philox(1)).standard_normal((2, 3, 16, 16), np.float32))
    with torch.no_grad():
        black, white, null = (unet(noise, 700, torch.full((2,), label)).sample.mean() for label in (0, 1, 2))
    assert black > null > white  # a white image holds more of what is seen, so less of it is noise
    moved = (unet.get_parameter("class_embedding.weight").detach() - before).abs().amax(dim=1)
    assert (moved > 0).all()  # the null class too


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_low_precision_stays_close_to_float32(precision, tolerance, monkeypatch):
    """Relative difference of the loss in each of six steps; half precision rounds to 8 or 11 bits.

    Weights stay float32, and the scale of float16's loss is taken out of the gradients again.
    """
    monkeypatch.setattr("dtpipe.distill.teacher.trainer.pick_precision", lambda name, _device: getattr(torch, name))
    trainers, losses = zip(
        *(trained(tiny_teacher(lr=1e-4, precision=name)) for name in ("float32", precision)), strict=True
    )
    difference = abs(np.array(losses[1]) / np.array(losses[0]) - 1)
    assert (difference > 0).any()  # it was another arithmetic
    assert (difference < tolerance).all()
    assert all(value.dtype == torch.float32 for value in trainers[1].unet.state_dict().values())
    moments = [
        torch.cat([state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]) for trainer in trainers
    ]
    assert torch.nn.functional.cosine_similarity(*moments, dim=0) > 0.99
    assert moments[1].norm() / moments[0].norm() == pytest.approx(1, rel=0.05)


def test_float16_needs_a_gpu(config):
    with pytest.raises(ConfigError, match=r"precision is float16, which trains on a GPU only; use bfloat16"):
        train(changed(config, precision="float16"))


def test_a_gpu_that_is_not_there_is_named(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        train(changed(config, device="cuda"))


@pytest.mark.parametrize("changes", [{}, {"class_conditional": True, "label_dropout": 0.3}])
def test_a_killed_run_goes_the_way_of_an_unbroken_one(config, tmp_path, changes):
    config = changed(config, **changes)
    unbroken = changed(config, out=str(tmp_path / "unbroken"))
    train(unbroken)

    def die(progress):
        os.kill(os.getpid(), signal.SIGKILL)

    assert fork_ranks(lambda _: train(changed(config, log_every=5), on_progress=die).step, tmp_path, 1) == [None]
    assert load_checkpoint(last(config), TRAIN_TEACHER)["step"] == 4
    assert train(config).finished
    assert_equal_checkpoints(last(config), last(unbroken), TRAIN_TEACHER)


def test_a_signal_stops_a_run_before_its_teacher_is_written(config):
    stop = [signal.SIGTERM]
    with pytest.raises(StoppedError, match=r"step 2 of 6: stopped by SIGTERM; .*last\.pt is saved"):
        train(config, on_progress=lambda _: signal.raise_signal(stop.pop()) if stop else None)
    assert not (Path(config.run.out) / "unet").exists()
    assert train(config).finished


def test_more_steps_continue_a_finished_teacher(config, tmp_path):
    unbroken = changed(config, out=str(tmp_path / "unbroken"))
    train(unbroken)
    train(changed(config, steps=4))
    assert train(config).step == 6
    assert_equal_checkpoints(last(config), last(unbroken), TRAIN_TEACHER)


def test_a_time_limit_stops_and_still_writes(config):
    result = train(changed(config, max_hours=1e-9))
    assert (result.finished, result.step) == (False, 1)
    assert result.samples.exists()


@pytest.mark.parametrize("written", [True, False])
def test_other_settings_into_the_same_folder_are_refused_before_images_are_opened(config, written):
    """Also where only the checkpoint has them, as in runs from before there was a config.yaml."""
    train(changed(config, steps=1))
    if not written:
        (Path(config.run.out) / "config.yaml").unlink()
    with pytest.raises(PlanChangedError, match=r"train_teacher\.lr: 0\.001 -> 0\.01; train_teacher\.seed: 0 -> 1"):
        train_ddpm(changed(config, lr=0.01, seed=1), opens_nothing, None, draw_grey)


def test_a_second_run_in_the_same_folder_is_refused_before_it_opens_images(config):
    def second(progress):
        with pytest.raises(LockHeldError, match="another process trains in this folder"):
            train_ddpm(config, opens_nothing, None, draw_grey)

    assert train(config, on_progress=second).finished


def test_one_side_of_a_square_may_be_spelled_twice(config):
    train(changed(config, px=(16, 16), steps=1))
    assert train(changed(config, steps=1)).finished


def test_other_classes_than_the_checkpoints_are_refused(config):
    config = changed(config, class_conditional=True, steps=1)
    images = noise_images(config)
    train(config, images)
    with pytest.raises(
        PlanChangedError, match=r'last\.pt was trained on other data \(classes\[1\]: "dog" -> "hound"\)'
    ):
        train(changed(config, steps=2), in_memory(images.pixels, images.labels, ("cat", "hound")))


def test_training_that_diverges_names_images_and_writes_no_teacher(config):
    wild = changed(config, lr=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"in step 2, in a batch of \d\.png, .*lower train_teacher\.lr"):
        train(wild)
    assert load_checkpoint(last(wild), TRAIN_TEACHER)["step"] == 1
    assert not (Path(wild.run.out) / "unet").exists()


def test_weights_to_start_from_are_read_once_and_named_in_the_record(config):
    """A later part of the run does not need them any more."""
    config = changed(config, init_from="elsewhere")

    def start_from(of, unet):
        assert of == changed(config, steps=2)
        with torch.no_grad():
            unet.get_parameter("conv_out.bias").fill_(3.0)
        return "abc"

    train(changed(config, steps=2), start_from=start_from)
    saved = load_checkpoint(last(config), TRAIN_TEACHER)
    assert (saved["unet"]["conv_out.bias"] - 3).abs().max() < 0.1
    assert (saved["ema"]["conv_out.bias"] - 3).abs().max() < 0.1  # which began there too
    assert train(config).finished
    assert json.loads((Path(config.run.out) / "train.json").read_text())["started_from_weights_blake3"] == "abc"


def test_a_checkpoint_of_the_first_version_trains_on(tmp_path):
    last = tmp_path / "last.pt"
    last.write_bytes(gzip.decompress((FIXTURES / "first_version_last.pt.gz").read_bytes()))
    saved = load_checkpoint(last, TRAIN_TEACHER)
    assert saved["step"] == 3
    config = build(TrainTeacherConfig, saved["config"], images="memory", out=str(tmp_path), steps=5)
    result = train(config)
    assert (result.step, result.finished) == (5, True)
    later = load_checkpoint(last, TRAIN_TEACHER)["optimizer"]["state"]
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}
    assert {int(state["step"]) for state in later.values()} == {5}  # the optimiser went on, it did not begin anew


def test_the_teacher_says_by_content_which_images_it_was_trained_on(config):
    train(config)
    pixels = noise_images(config).pixels
    assert set(read_digests(last(config).with_name(TRAIN_IMAGES))) == {image_digest(image) for image in pixels}
