"""Equation (1): the student regresses the whitened level of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.losses.base import LossKind, Whitening, check_same_shape, whiten


@dataclass(frozen=True)
class RegressionLoss:
    """Mean over batch and elements of (f_r - W(f_g))^2."""

    whiten: Whitening = "layer"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Shapes: student, teacher (B, C, H, W) -> scalar float32. Raises: ShapeError when the shapes differ."""
        check_same_shape(student, teacher)
        return F.mse_loss(student.float(), whiten(teacher, self.whiten))


LOSS = LossKind(
    "mse",
    "Equation (1) for one level: mean over batch and elements of (f_r - W(f_g))^2.",
    lambda config: RegressionLoss(config.whiten),
)
