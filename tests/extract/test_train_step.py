"""One step of training against its formulas in float64, and in low precision against float32."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_data import TrainImages, draw_batch
from dtpipe.extract.train_network import noise_schedule
from dtpipe.extract.train_state import TrainState, resume_or_start
from dtpipe.extract.train_step import learning_rate, loss_weight, train_step
from dtpipe.manifests.errors import DivergedError
from parts.paths import FIXTURES

TINY = json.loads((FIXTURES / "train" / "tiny.json").read_text())
IMAGES = TrainImages(np.random.Generator(np.random.Philox(7)).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
BETAS = np.linspace(1e-4, 0.02, 1000)


def make(**changes: object) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(TINY | {"images": "", "out": "nowhere"} | changes)


def take(config: TrainTeacherConfig, state: TrainState, images: TrainImages = IMAGES) -> float:
    return train_step(config, state, draw_batch(config, images, state.step), torch.from_numpy(noise_schedule(config)))


@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_a_step_follows_the_formulas(weighting):
    """Loss, gradient clipping and AdamW of one step, restated by hand in float64."""
    config = make(batch_size=6, loss_weighting=weighting)
    batch = draw_batch(config, IMAGES, 0)
    reference = resume_or_start(config, "cpu").unet.double()
    wanted = torch.zeros((), dtype=torch.float64)
    for clean, timestep, noise in zip(
        batch.clean.double(), batch.timesteps.tolist(), batch.noise.double(), strict=True
    ):
        kept = 1.0
        for beta in BETAS[: timestep + 1]:
            kept *= 1 - beta
        snr = kept / (1 - kept)
        weight = min(snr, 5.0) / snr if weighting == "min_snr" else 1.0
        predicted = reference((kept**0.5 * clean + (1 - kept) ** 0.5 * noise)[None], timestep).sample[0]
        wanted = wanted + weight * ((predicted - noise) ** 2).mean() / 6
    gradients = torch.autograd.grad(wanted, list(reference.parameters()))
    state = resume_or_start(config, "cpu")
    before = {name: value.detach().clone() for name, value in state.unet.named_parameters()}
    loss = take(config, state)
    assert abs(loss - wanted.item()) < 1e-5 * wanted.item()
    scale = min(1.0, config.grad_clip / sum(float(each.square().sum()) for each in gradients) ** 0.5)
    for (name, value), gradient in zip(state.unet.named_parameters(), gradients, strict=True):
        clear = (
            gradient * scale
        ).abs() > 1e-5  # AdamW's first step is lr * sign, where the gradient exceeds eps and rounding
        moved = (value.detach() - before[name])[clear].double()
        step = -learning_rate(config, 0) * (gradient * scale / ((gradient * scale).abs() + 1e-8))[clear]
        torch.testing.assert_close(moved, step, rtol=2e-2, atol=1e-7)


def test_min_snr_weighs_early_timesteps_down_and_late_ones_not():
    kept = torch.from_numpy(np.cumprod(1 - BETAS))
    weights = loss_weight(make(loss_weighting="min_snr"), kept)
    assert weights[0] < 1e-3  # SNR 9999: 5 / 9999
    assert (weights.diff() >= 0).all()
    assert (weights[kept < 5 / 6] == 1).all()  # SNR below 5


def test_training_learns():
    """On one image the loss falls well below one, the loss of a network that predicts nothing."""
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[:, :8] = 200
    config = make(steps=150, batch_size=8, lr=3e-3)
    state = resume_or_start(config, "cpu")
    losses = [take(config, state, TrainImages(pixels)) for _ in range(config.steps)]
    assert np.mean(losses[:5]) > 0.8
    assert np.mean(losses[-20:]) < 0.35


def test_the_network_learns_from_its_class():
    """Two classes of one grey each at the noisiest timesteps: only the class tells which, so only with it the loss falls far."""
    pixels = np.repeat(np.array([0, 255], np.uint8), 8 * 16 * 16 * 3).reshape(16, 16, 16, 3)
    told = TrainImages(pixels, np.repeat([0, 1], 8), ("black", "white"))
    config = make(steps=60, batch_size=8, lr=5e-3, class_conditional=True, label_dropout=0.5, flip=False)
    state = resume_or_start(config, "cpu", classes=told.classes)
    before = state.unet.get_parameter("class_embedding.weight").detach().clone()
    for _ in range(config.steps):
        take(config, state, told)
    noise = torch.from_numpy(np.random.Generator(np.random.Philox(1)).standard_normal((2, 3, 16, 16), np.float32))
    with torch.no_grad():
        black, white, null = (state.unet(noise, 700, torch.full((2,), label)).sample.mean() for label in (0, 1, 2))
    assert black > null > white  # a white image holds more of what is seen, so less of it is noise
    moved = (state.unet.get_parameter("class_embedding.weight").detach() - before).abs().amax(dim=1)
    assert (moved > 0).all()  # the null class too


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_low_precision_stays_close_to_float32(precision, tolerance):
    """Relative difference of the loss in each of six steps; half precision rounds to 8 or 11 bits. Weights stay float32."""
    exact, low = make(lr=1e-4), make(lr=1e-4, precision=precision)
    states = [resume_or_start(config, "cpu") for config in (exact, low)]
    losses = np.array(
        [[take(config, state) for _ in range(6)] for config, state in zip((exact, low), states, strict=True)]
    )
    difference = abs(losses[1] / losses[0] - 1)
    assert (difference > 0).any()  # it was another arithmetic
    assert (difference < tolerance).all()
    assert all(value.dtype == torch.float32 for value in states[1].unet.state_dict().values())
    gradients = [torch.cat([value.grad.flatten() for value in state.unet.parameters()]) for state in states]
    assert (
        torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    )  # the scale of float16's loss is taken out again


def test_an_overflow_in_float16_skips_the_update_and_lowers_the_scale():
    config = make(precision="float16")
    state = resume_or_start(config, "cpu")
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # no gradient of this network fits
    before = {name: value.clone() for name, value in state.unet.state_dict().items()}
    take(config, state)
    assert state.step == 1
    assert state.scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in state.unet.state_dict().items())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weights_that_are_not_finite_end_training(precision):
    config = make(precision=precision)
    state = resume_or_start(config, "cpu")
    with torch.no_grad():
        state.unet.get_parameter("conv_out.bias").fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"in step 1 the loss is nan .*lower train_teacher\.lr"):
        take(config, state)


def test_learning_rate_rises_holds_and_falls():
    config = make(steps=10, warmup_steps=2, decay_steps=4, lr=1.0)
    assert [learning_rate(config, step) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
