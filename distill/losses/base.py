"""What a feature loss is: a function of one level's f_r and f_g that carries its own settings.

f_r is the student's level after the regressor's 1x1 convolution, f_g the teacher's as it was encoded. Norms and
reductions run in float32. Every loss is a mean over the batch: parts of a batch add up when weighted by their counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dtpipe.distill.config import LossConfig
from dtpipe.manifests.errors import ShapeError

Whitening = Literal["layer", "channel", "none"]
WHITEN_EPS = 1e-5  # of torch's LayerNorm


class LevelLoss(Protocol):
    """A loss of one level; its settings are the object's fields."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Shapes: student f_r (B, Cs, H, W), teacher f_g (B, Ct, H, W) -> scalar float32, mean over B."""


@dataclass(frozen=True)
class LossKind:
    """A loss that settings can name: its weight is `distill.loss.<name>_weight`, a field of `LossConfig`."""

    name: str
    summary: str
    build: Callable[[LossConfig], LevelLoss]


def whiten(level: Tensor, over: Whitening = "layer") -> Tensor:
    """W of equation (1): LayerNorm without affine parameters.

    Over (C, H, W) of each sample ("layer"), over C at each position ("channel"); "none" leaves the level as it is.

    Shapes: (B, C, H, W) -> (B, C, H, W), float32.
    """
    level = level.float()
    if over == "none":
        return level
    dims = (1, 2, 3) if over == "layer" else (1,)
    variance, mean = torch.var_mean(level, dim=dims, correction=0, keepdim=True)
    return (level - mean) * torch.rsqrt(variance + WHITEN_EPS)


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raises: ShapeError with both shapes when they differ."""
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student level is {tuple(student.shape)}, teacher level is {tuple(teacher.shape)}; "
            "the regressor must map to the teacher's channels and size"
        )
