"""Equation (1): the student regresses the whitened level of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.losses.base import LossKind, check_same_shape


@dataclass(frozen=True)
class RegressionLoss:
    """Mean over batch and elements of (f_r - W(f_g))^2."""

    def __call__(self, student: Tensor, teacher: Tensor, white: Tensor) -> Tensor:
        """Shapes: all (B, C, H, W) -> scalar float32. Raises: ShapeError when the shapes differ."""
        check_same_shape(student, teacher)
        return F.mse_loss(student.float(), white)


LOSS = LossKind(
    "mse",
    "Equation (1) for one level: mean over batch and elements of (f_r - W(f_g))^2.",
    lambda _config: RegressionLoss(),
)
