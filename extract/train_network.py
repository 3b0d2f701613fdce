"""The network that is trained: a diffusers UNet2DModel, fresh from a seed or with the weights of another teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtpipe.extract.teachers.diffusion.files import find_unet
from dtpipe.extract.teachers.diffusion.process import Schedule, alphas_cumprod
from dtpipe.extract.teachers.files.weights import load_strictly, read_weights, weights_digest
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from torch import nn

_NOT_WEIGHTS = frozenset(
    {"sample_size", "num_train_timesteps"}
)  # of a network's settings: the size it saw; unused without learned steps


def noise_schedule(config: TrainTeacherConfig) -> Schedule:
    """Products of 1 - beta of the linear schedule, float64, (timesteps,)."""
    return alphas_cumprod({"num_train_timesteps": config.timesteps})


def null_class(config: TrainTeacherConfig, num_classes: int) -> int | None:
    """The class of images whose own is withheld, after all others; None when none is."""
    return num_classes if config.label_dropout else None


def build_unet(config: TrainTeacherConfig, num_classes: int = 0) -> nn.Module:
    """A fresh diffusers UNet2DModel, its weights a function of the seed.

    Source: Ho et al., arXiv 2006.11239; for `adm` Dhariwal & Nichol, arXiv 2105.05233, as in openai/guided-diffusion.
    Differs: no learned variances; the features that a teacher is read for do not depend on that head.
    """
    import torch
    from diffusers import UNet2DModel

    attention = [2**level in config.attention_strides for level in range(len(config.channels))]
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if config.network == "adm"
        else ("DownBlock2D", "UpBlock2D")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet2DModel(
            sample_size=config.px,
            layers_per_block=config.blocks,
            block_out_channels=config.channels,
            down_block_types=tuple("AttnDownBlock2D" if has else down for has in attention),
            up_block_types=tuple("AttnUpBlock2D" if has else up for has in reversed(attention)),
            attention_head_dim=config.head_channels,
            norm_num_groups=config.norm_groups,
            norm_eps=1e-5,
            num_class_embeds=num_classes + (null_class(config, num_classes) is not None) if num_classes else None,
            **_adm_settings(config),
        )
    model: nn.Module = unet
    return model


def _adm_settings(config: TrainTeacherConfig) -> dict[str, Any]:
    if config.network != "adm":
        return {}
    resampling = {"downsample_type": "resnet", "upsample_type": "resnet"}
    return {**resampling, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": config.norm_groups}


def start_from(config: TrainTeacherConfig, unet: Any, folder: str) -> str:
    """Put the weights of the teacher in `folder` into `unet`; returns their digest.

    Raises: TeacherError when it is missing or damaged, its network is another one, or it learned another noise schedule.
    """
    import torch
    from diffusers import UNet2DModel

    if not Path(folder).is_dir():
        raise TeacherError(
            f"{folder}: no such folder; train_teacher.init_from names the folder of a teacher (diffusers DDPMPipeline)"
        )
    files = find_unet(folder)
    with torch.device("meta"):
        theirs, ours = dict(UNet2DModel(**files.architecture).config), dict(unet.config)
    names = sorted(name for name in ours if not name.startswith("_") and name not in _NOT_WEIGHTS)
    if other := [
        f"{name} is {theirs[name]}, not {ours[name]}" for name in names if _plain(theirs[name]) != _plain(ours[name])
    ]:
        raise TeacherError(
            f"{folder}: its network is another one than train_teacher asks for: {'; '.join(other)}; make them equal"
        )
    schedule, learned = noise_schedule(config), alphas_cumprod(files.scheduler)
    if (
        files.scheduler["prediction_type"] != "epsilon"
        or len(schedule) != len(learned)
        or not np.allclose(schedule, learned, rtol=1e-6)
    ):
        raise TeacherError(
            f"{folder}: was trained for another noise schedule or target than epsilon under {config.timesteps} linear steps; "
            "train_teacher.init_from cannot go on from it"
        )
    tensors = read_weights(files.weights)
    load_strictly(unet, tensors, files.weights)
    return weights_digest(tensors)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
