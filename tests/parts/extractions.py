"""Tiny teachers of the real families, and small extractions with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dtpipe.extract.teachers.base import TapSpec, TeacherSpec, takes_no_images
from dtpipe.extract.teachers.files.weights import weights_digest
from dtpipe.extract.teachers.taps import TapReader

PX = 32
Extract = Callable[..., str]


def write_ddpm(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    """A DDPM pipeline folder of 32 px with random weights and levels l2 and l3."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"sample_size": PX, "block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        kinds = {"down_block_types": ("DownBlock2D",) * 4, "up_block_types": ("UpBlock2D",) * 4}
        DDPMPipeline(UNet2DModel(**shape, **kinds), DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


class TinyGan:
    """z (B, 6) -> images of 32 px; levels l2 and l3 are the outputs of two of its layers."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            layers = [nn.ConvTranspose2d(6, 12, 4, 1), nn.Tanh(), nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.Tanh()]
            self.network = nn.Sequential(
                *layers, nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()
            ).eval()
        taps = (TapSpec("l2", 4, 8, "2"), TapSpec("l3", 8, 12, "0"))
        digest = weights_digest(self.network.state_dict())
        self.spec = TeacherSpec("tiny_gan", digest, (PX, PX), taps, noise_shapes={"z": (6,)}, synthesizes=True)

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: object) -> dict[str, Tensor]:
        raise takes_no_images("tiny_gan")

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images: list[Tensor] = []
        reader = TapReader(self.network, {level.name: level.tap for level in self.spec.levels})
        levels = reader.read(lambda: images.append(self.network(noise["z"][:, :, None, None])), stop_early=False)
        return images[0], levels
