"""Tiny random checkpoints of every family, and settings with which a preset runs in a second."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dtpipe.extract.config import TeacherConfig
from parts import biggan_cases, sd_pipelines, stylegan2_snapshots
from parts.images import PX
from parts.paths import FIXTURES
from parts.teachers import write_ddpm
from parts.tensors import random_weights

SMALL = {"student": {"name": "resnet10t"}, "regressor": {"width": 8}, "micro_batch": 2, "run": {"device": "cpu"}}


@dataclass(frozen=True)
class TinyTeacher:
    """A checkpoint, and what a preset must be told to run with it."""

    path: Path
    px: int | tuple[int, int]
    synthesizes: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    taps: dict[str, str] | None = None
    kind: str = "auto"

    def config(self, dtype: str = "float32", **options: Any) -> TeacherConfig:
        """The teacher as settings name it; `options` beside its own."""
        named = {
            "path": str(self.path),
            "kind": self.kind,
            "taps": self.taps,
            "dtype": dtype,
            "options": self.options | options,
        }
        return TeacherConfig.model_validate(named)

    def settings(self, dtype: str = "float32") -> dict[str, Any]:
        """Laid over a preset, last: size, student, place, and arithmetic, since CPUs are slow in half precision."""
        px = list(self.px) if isinstance(self.px, tuple) else self.px
        teacher = {"options": self.options, "dtype": dtype}
        run = {"inline": True, "device": "cpu", "max_bad": 0}
        place = {"batch_size": 2, "shard": {"samples": 2}, "run": run}
        return {"extract": {"transform": {"px": px}, "teacher": teacher, **place}, "distill": SMALL}


def adm(folder: Path) -> TinyTeacher:
    """guided-diffusion's 256 px layout at an eighth of the width."""
    shapes = json.loads(str(np.load(FIXTURES / "adm" / "adm256_layout.npz")["about"]))["shapes"]
    torch.save(random_weights(shapes), folder / "256x256_diffusion_uncond.pt")
    options = {"num_head_channels": 32, "use_new_attention_order": False, "noise_schedule": "linear", "image_px": 64}
    return TinyTeacher(folder / "256x256_diffusion_uncond.pt", 32, options=options)


def stable_diffusion(folder: Path) -> TinyTeacher:
    """A whole pipeline folder, tokenizer included."""
    return TinyTeacher(sd_pipelines.save_pipeline(folder / "sd"), 64)


def biggan(folder: Path) -> TinyTeacher:
    """A class-conditional generator of 128 px, as the published ones are."""
    cases = biggan_cases
    return TinyTeacher(cases.save(cases.weights("class_cond"), folder, "biggan.pth"), 128, True)


def icgan(folder: Path) -> TinyTeacher:
    """A generator of 256 px and two instances."""
    cases = biggan_cases
    np.save(folder / "instances.npy", cases.features())
    path = cases.save(cases.weights("icgan256"), folder, "icgan.pth")
    return TinyTeacher(path, 256, True, {"instances": str(folder / "instances.npy")})


def stylegan2(folder: Path) -> TinyTeacher:
    """A snapshot whose images are twice as wide as high, since the learned constant is."""
    from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout

    files = stylegan2_snapshots
    layout = StyleGan2Layout(6, 5, 0, 0, (7, 5), (4, 8), (6, 5, 4, 3, 3), conv_clamp=256.0)
    path = folder / "network-snapshot.pkl"
    path.write_bytes(files.dumps(files.snapshot(files.random_weights(layout), layout)))
    return TinyTeacher(path, (64, 128), True)


def ddpm(folder: Path) -> TinyTeacher:
    """A pipeline folder."""
    return TinyTeacher(write_ddpm(folder / "ddpm"), PX)


def vae(folder: Path) -> TinyTeacher:
    """The autoencoder of the Stable Diffusion."""
    sd_pipelines.save_vae(folder / "vae")
    return TinyTeacher(folder / "vae", 64)


class TinyDecoder(nn.Module):
    """z (B, 6, 1, 1) -> (B, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = nn.ConvTranspose2d(6, 8, 4), nn.ConvTranspose2d(8, 3, 4, 4)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.fine(torch.relu(self.coarse(z))))


def module(folder: Path, network: type[nn.Module] = TinyDecoder) -> TinyTeacher:
    """A generator of this file's, as if it were a package's."""
    save_file(network().state_dict(), folder / "weights.safetensors")
    options = {"module": f"{network.__module__}:{network.__name__}", "image_px": [16, 16], "z_shape": [6, 1, 1]}
    return TinyTeacher(folder / "weights.safetensors", 16, True, options, {"l2": "coarse"}, "module")


def null(_folder: Path) -> TinyTeacher:
    """Noise in small shapes."""
    return TinyTeacher(Path("measure-only"), 32, options={"channels": {"l2": 4, "l3": 6}, "px": 32})


MAKERS = {
    "adm": adm,
    "stable_diffusion": stable_diffusion,
    "biggan": biggan,
    "icgan": icgan,
    "stylegan2": stylegan2,
} | {
    "ddpm": ddpm,
    "vae": vae,
    "module": module,
    "null": null,
}
