"""The trained network: its layout against published sizes, and which weights it may start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_network import build_unet, noise_schedule, start_from
from dtpipe.manifests.errors import TeacherError
from parts.paths import FIXTURES, PRESETS

TINY = json.loads((FIXTURES / "train" / "tiny.json").read_text())


def make(**changes: object) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(TINY | {"images": "", "out": "nowhere"} | changes)


def num_parameters(config: TrainTeacherConfig) -> int:
    with torch.device("meta"):
        return sum(value.numel() for value in build_unet(config).parameters())


def write_teacher(path: Path, unet: object = None, **scheduler: object) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(unet=unet or build_unet(make(seed=9)), scheduler=DDPMScheduler(**scheduler)).save_pretrained(path)
    return path


def test_adm_has_the_size_of_guided_diffusions_256_px_network():
    """552,814,086 parameters as published (256x256_diffusion_uncond.pt), less those of three outputs for learned variances."""
    config = make(
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
    unet = build_unet(make(network="adm"))
    names = dict(unet.named_modules())
    assert "down_blocks.0.downsamplers.0.conv1" in names
    assert names["down_blocks.0.resnets.0.time_emb_proj"].out_features == 2 * 8  # scale and shift
    assert unet(torch.zeros(1, 3, 16, 16), 0).sample.shape == (1, 3, 16, 16)


def test_weights_are_a_function_of_the_seed_alone():
    one, other = build_unet(make()).state_dict(), build_unet(make(seed=1)).state_dict()
    torch.rand(3)
    again = build_unet(make()).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_the_schedule_is_the_one_the_teacher_is_written_with():
    from diffusers import DDPMScheduler

    written = DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    ).alphas_cumprod
    torch.testing.assert_close(torch.from_numpy(noise_schedule(make())).float(), written, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8, 16, 16)}, r"block_out_channels is \(8, 8, 16\), not \(8, 16, 16\); make them equal"),
        ({"network": "adm"}, r"downsample_type is conv, not resnet"),
        ({"attention_strides": (), "head_channels": 4}, "attention_head_dim is 8, not 4; down_block_types is"),
        ({"timesteps": 100}, "another noise schedule or target than epsilon under 100 linear steps"),
    ],
)
def test_weights_of_another_network_or_schedule_are_refused(tmp_path, changes, message):
    config = make(**changes)
    with pytest.raises(TeacherError, match=message):
        start_from(config, build_unet(config), str(write_teacher(tmp_path)))


@pytest.mark.parametrize("scheduler", [{"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_weights_that_predict_something_else_are_refused(tmp_path, scheduler):
    with pytest.raises(TeacherError, match="another noise schedule or target"):
        start_from(make(), build_unet(make()), str(write_teacher(tmp_path, **scheduler)))


def test_damaged_or_missing_weights_to_start_from_are_named(tmp_path):
    with pytest.raises(TeacherError, match=r"google/ddpm-x: no such folder; train_teacher\.init_from names the folder"):
        start_from(make(), build_unet(make()), "google/ddpm-x")
    weights = write_teacher(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TeacherError, match="not readable as weights"):
        start_from(make(), build_unet(make()), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "px", "millions"),
    [("bdd100k_teacher", (128, 256), 112.2), ("small_teacher", (64, 64), 24.9), ("adm_teacher", (256, 256), 138.3)],
)
def test_presets_build(name, px, millions):
    settings = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["train_teacher"]
    config = TrainTeacherConfig.model_validate(settings | {"images": "photos", "out": "teacher"})
    assert config.image_px == px
    assert num_parameters(config) / 1e6 == pytest.approx(millions, abs=0.1)
