"""Tiny teachers of the real families: a diffusion pipeline on disk, and a GAN in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dtpipe.extract.teachers.base import Generator, TapSpec, TeacherKind, TeacherSpec
from dtpipe.extract.teachers.files.weights import weights_digest
from dtpipe.extract.teachers.taps import TapReader
from parts.images import PX


def write_ddpm(folder: Path, seed: int = 0, channels: tuple[int, ...] = (8, 8, 8, 16), **scheduler: object) -> Path:
    """A DDPM pipeline folder of 32 px with random weights and levels l2, l3 and on, by the number of its `channels`."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=PX,
            block_out_channels=channels,
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
        )
    DDPMPipeline(unet, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def gan_network() -> nn.Sequential:
    """z (B, 6, 1, 1) -> (B, 3, 32, 32); the outputs of layers 0 and 2 have strides 8 and 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            *(nn.ConvTranspose2d(6, 12, 4, 1), nn.LeakyReLU(0.2)),
            *(nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Tanh(), nn.ConvTranspose2d(8, 3, 4, 2, 1)),
        ).eval()


class TinyGan:
    """z (B, 6) -> twice what the network gives: some values lie outside [-1, 1], and are infinite where z[0] > 2."""

    def __init__(self) -> None:
        self.network = gan_network()
        taps = (TapSpec("l2", 4, 8, "2"), TapSpec("l3", 8, 12, "0"))
        digest = weights_digest(self.network.state_dict())
        self.spec = TeacherSpec("tiny_gan", digest, (PX, PX), taps, noise_shapes={"z": (6,)})

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        outputs: list[Tensor] = []
        reader = TapReader(self.network, {level.name: level.tap for level in self.spec.levels})
        levels = reader.read(lambda: outputs.append(self.network(noise["z"][:, :, None, None])), stop_early=False)
        images = outputs[0] * 2
        images[noise["z"][:, 0] > 2] = float("inf")
        return images, levels


GAN_KIND = TeacherKind("tiny_gan", "nothing", Generator, lambda path: False, lambda config, device: TinyGan())
