"""The network that is trained: a fresh diffusers UNet2DModel, and the noise schedule it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtpipe.distill.teacher.config import TrainTeacherConfig

BETA_RANGE = (1e-4, 0.02)


def noise_schedule(config: TrainTeacherConfig) -> NDArray[np.float64]:
    """Products of 1 - beta of the linear schedule, float64, (timesteps,)."""
    return np.cumprod(1 - np.linspace(*BETA_RANGE, config.timesteps, dtype=np.float64), dtype=np.float64)


def null_class(config: TrainTeacherConfig, num_classes: int) -> int | None:
    """The class of images whose own is withheld, after all others; None when none is."""
    return num_classes if config.label_dropout else None


def build_unet(config: TrainTeacherConfig, num_classes: int = 0) -> Any:
    """A fresh diffusers UNet2DModel, its weights a function of the seed.

    Source: Ho et al., arXiv 2006.11239; for `adm` Dhariwal & Nichol, arXiv 2105.05233, as in openai/guided-diffusion.
    Differs: no learned variances; the features that a teacher is read for do not depend on that head.
    """
    from diffusers import UNet2DModel

    attention = [2**level in config.attention_strides for level in range(len(config.channels))]
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if config.network == "adm"
        else ("DownBlock2D", "UpBlock2D")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UNet2DModel(
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


def _adm_settings(config: TrainTeacherConfig) -> dict[str, Any]:
    if config.network != "adm":
        return {}
    resampling = {"downsample_type": "resnet", "upsample_type": "resnet"}
    return {**resampling, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": config.norm_groups}
