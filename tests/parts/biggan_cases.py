"""Small BigGAN generators whose outputs the original code gave (fixtures/biggan/README.md), as checkpoints on disk."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtpipe.extract.noise import draw_noise
from parts import paths

FIXTURES = paths.FIXTURES / "biggan"
PARITY = paths.PARITY
CLASSES = (2, 5)  # of the two samples
Weights = dict[str, Tensor]


@cache
def about(case: str) -> dict[str, Any]:
    """Constructor's arguments, shapes and counter of a case."""
    content: dict[str, Any] = json.loads(str(np.load(FIXTURES / f"{case}.npz")["about"]))
    return content


def arrays(case: str) -> dict[str, np.ndarray]:
    """What the original code gave."""
    stored = np.load(FIXTURES / f"{case}.npz")
    return {name: stored[name] for name in stored if name != "about"}


def weights(case: str) -> Weights:
    """The checkpoint's tensors, by the rule of the README."""
    tensors = {name: _weight(name, tuple(shape)) for name, shape in about(case)["shapes"].items()}
    return {
        name: torch.full((1,), float(about(case)["counter"])) if name.endswith("accumulation_counter") else tensor
        for name, tensor in tensors.items()
    }


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    noise = torch.from_numpy(np.asarray(draw_noise(0, name, 0, "z", shape), np.float32).reshape(shape))
    leaf = name.rpartition(".")[2]
    if leaf.endswith("_var"):
        return (noise / 4).exp()
    if leaf.endswith("_mean"):
        return noise / 4
    if leaf == "weight" and len(shape) > 1:
        return noise / int(np.prod(shape[1:])) ** 0.5
    if leaf == "bias":
        return noise / 10
    return 1 + noise / 4 if leaf in ("gain", "weight", "gamma") else noise


def latents(size: int, num: int = 2) -> Tensor:
    """Standard normal. Shapes: -> (num, size)."""
    return torch.from_numpy(draw_noise(0, "z", 0, "z", (num, size)))


def features() -> np.ndarray:
    """Two instances' features, of unit length. Shapes: -> [2, 2048]."""
    noise = np.abs(draw_noise(0, "h", 0, "z", (2, 2048)))
    return noise / np.linalg.norm(noise.astype(np.float64), axis=1, keepdims=True).astype(np.float32)


def save(tensors: Weights, folder: Path, name: str = "G_ema.pth") -> Path:
    """A checkpoint file as the authors' code writes it."""
    torch.save(tensors, folder / name)
    return folder / name


def cropped(full: Tensor, side: int) -> np.ndarray:
    """Every k-th position and at most 8 channels, as stored. Shapes: (B, C, H, W) -> [B, c, side, side]."""
    step = max(1, full.shape[-1] // side)
    return full[:, :8, ::step, ::step].float().numpy()


def taps_of(case: str) -> dict[str, str]:
    """All maps that a case has arrays of and that have a stride above 1, by level name."""
    image_px = about(case)["config"]["resolution"]
    taps = {}
    for name in arrays(case):
        if name != "image":
            px = int(name.removeprefix("feat_"))
            block = px.bit_length() - 4
            layer = int(f"blocks.{block}.1.gamma" in about(case)["shapes"])
            taps[f"l{(image_px // px).bit_length() - 1}"] = "linear" if px == 4 else f"blocks.{block}.{layer}"
    return taps


def largest_errors(case: str, sample: int, images: Tensor, levels: Weights) -> dict[str, float]:
    """Largest absolute difference from the original code, by array, of one sample."""
    stored = arrays(case)
    made = {f"feat_{level.shape[-1]}": cropped(level, 8) for level in levels.values()} | {"image": cropped(images, 32)}
    assert set(made) == set(stored)
    return {name: float(np.abs(made[name][sample] - stored[name][sample]).max()) for name in stored}
