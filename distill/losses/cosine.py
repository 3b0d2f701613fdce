"""Cosine distance, not in the paper: blind to the strength of features, so that no position outweighs another."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.losses.base import LossKind, check_same_shape


@dataclass(frozen=True)
class CosineDistance:
    """1 - cos(f_r, W(f_g)) of the C values at each position; mean over positions and batch. 0 to 2."""

    def __call__(self, student: Tensor, teacher: Tensor, white: Tensor) -> Tensor:
        """Shapes: all (B, C, H, W) -> scalar float32. Raises: ShapeError when the shapes differ."""
        check_same_shape(student, teacher)
        return 1 - F.cosine_similarity(student.float(), white, dim=1).mean()


LOSS = LossKind(
    "cosine",
    "1 - cos(f_r, W(f_g)) of the C values at each position of one level; mean over positions and batch. 0 to 2.",
    lambda _config: CosineDistance(),
)
