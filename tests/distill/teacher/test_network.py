"""The trained network: its layout against published sizes, its weights a function of the seed."""

from __future__ import annotations

import pytest
import torch
import yaml

from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.network import build_unet, noise_schedule
from parts.ddpm_training import tiny_teacher
from parts.paths import PRESETS
from parts.settings import build


def num_parameters(config: TrainTeacherConfig) -> int:
    with torch.device("meta"):
        return sum(value.numel() for value in build_unet(config).parameters())


def test_adm_has_the_size_of_guided_diffusions_256_px_network():
    """552,814,086 parameters as published (256x256_diffusion_uncond.pt), less three outputs for learned variances."""
    config = tiny_teacher(
        network="adm",
        px=256,
        channels=(256, 256, 512, 512, 1024, 1024),
        blocks=2,
        attention_strides=(8, 16, 32),
        head_channels=64,
        norm_groups=32,
    )
    assert num_parameters(config) == 552_814_086 - 3 * (256 * 3 * 3 + 1)


def test_adm_resamples_in_residual_blocks_and_scales_by_the_timestep():
    unet = build_unet(tiny_teacher(network="adm"))
    names = dict(unet.named_modules())
    assert "down_blocks.0.downsamplers.0.conv1" in names
    assert names["down_blocks.0.resnets.0.time_emb_proj"].out_features == 2 * 8  # scale and shift
    assert unet(torch.zeros(1, 3, 16, 16), 0).sample.shape == (1, 3, 16, 16)


def test_weights_are_a_function_of_the_seed_alone():
    one, other = build_unet(tiny_teacher()).state_dict(), build_unet(tiny_teacher(seed=1)).state_dict()
    torch.rand(3)
    again = build_unet(tiny_teacher()).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_the_schedule_is_the_one_the_teacher_is_written_with():
    from diffusers import DDPMScheduler

    written = DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    ).alphas_cumprod
    torch.testing.assert_close(torch.from_numpy(noise_schedule(tiny_teacher())).float(), written, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "px", "millions"),
    [("bdd100k_teacher", (128, 256), 112.2), ("small_teacher", (64, 64), 24.9), ("adm_teacher", (256, 256), 138.3)],
)
def test_presets_build(name, px, millions):
    settings = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["train_teacher"]
    config = build(TrainTeacherConfig, settings, images="photos", out="teacher")
    assert config.image_px == px
    assert num_parameters(config) / 1e6 == pytest.approx(millions, abs=0.1)
