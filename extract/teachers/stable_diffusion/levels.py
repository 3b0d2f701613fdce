"""Which levels a Stable Diffusion gives: those of its U-Net's decoder, and the VAE's posterior where that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtpipe.extract.teachers.base import TapSpec
from dtpipe.extract.teachers.stable_diffusion.files import PipelineFiles
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.schema import LATENT_SUFFIX

VAE = "vae"  # what stands for a tap where a level is the VAE's posterior
FINEST_STRIDE = 4  # of the levels that a student is taught


def latent_level(files: PipelineFiles) -> TapSpec:
    """The posterior's moments as a level."""
    stride = files.latent_stride
    return TapSpec(f"l{stride.bit_length() - 1}{LATENT_SUFFIX}", stride, 2 * files.latent_channels, VAE)


def levels_of(unet: Any, files: PipelineFiles, taps: Mapping[str, str] | None) -> dict[str, TapSpec]:
    """Levels found by stride, or at the named taps, on the network without values.

    Raises: TeacherError when a tap is unknown or the decoder has none of the strides.
    """
    import torch

    from dtpipe.extract.teachers.taps import DEFAULT_STRIDES, decoder_layers, find_levels, named_levels

    side = 2 * unet_stride(unet)
    with torch.device("meta"), torch.inference_mode():
        latent, text = (
            torch.zeros(1, files.latent_channels, side, side),
            torch.zeros(1, 1, files.unet.arguments["cross_attention_dim"]),
        )

        def forward() -> object:
            return unet(latent, 0, text)

        if taps:
            return named_levels(unet, forward, side * files.latent_stride, taps)
        strides = [stride * student_scale(files) for stride in DEFAULT_STRIDES]
        levels = find_levels(unet, forward, side * files.latent_stride, decoder_layers(unet), strides)
    if not levels:
        raise TeacherError(
            f"{files.unet.folder}: the decoder has none of the strides {strides}; name taps in extract.teacher.taps"
        )
    return levels


def student_scale(files: PipelineFiles) -> int:
    """How many times smaller a student's image must be than the teacher's for the finest level to have stride 4."""
    return max(1, files.latent_stride // FINEST_STRIDE)


def unet_stride(unet: Any) -> int:
    """Latent cells per cell of the coarsest level."""
    return int(2 ** sum(block.downsamplers is not None for block in unet.down_blocks))
