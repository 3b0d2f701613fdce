"""Equation (2), attention transfer: student and teacher respond at the same places, however strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.losses.base import LossKind
from dtpipe.manifests.errors import ShapeError


@dataclass(frozen=True)
class AttentionTransfer:
    """L2 distance, not squared, of the attention maps of f_r and raw f_g; mean over the batch.

    Both levels are taken as they are, whatever the whitening of the other losses.

    Source: Zagoruyko & Komodakis, arXiv 1612.03928, section 3.1.
    """

    power: int = 2
    """p: a position's energy is the sum of |activation|^p over channels."""

    def attention_map(self, level: Tensor) -> Tensor:
        """Q of equation (2): where a level responds, its energy scaled to unit length per image.

        Shapes: (B, C, H, W) -> (B, H*W), float32.
        """
        level = level.float()
        energies = level.square() if self.power == 2 else level.abs().pow(self.power)
        return F.normalize(energies.sum(dim=1).flatten(1), dim=1)

    def __call__(self, student: Tensor, teacher: Tensor, white: Tensor | None = None) -> Tensor:  # noqa: ARG002  raw
        """Shapes: student (B, Cs, H, W), teacher (B, Ct, H, W) -> scalar float32. Raises: ShapeError on other sizes."""
        if student.shape[-2:] != teacher.shape[-2:]:
            raise ShapeError(
                f"student level is {tuple(student.shape[-2:])}, teacher level is {tuple(teacher.shape[-2:])}; "
                "resize in the regressor, not in the loss"
            )
        difference = self.attention_map(student) - self.attention_map(teacher)  # (B, H*W)
        distance: Tensor = torch.linalg.vector_norm(difference, dim=1)  # (B,)
        return distance.mean()


LOSS = LossKind(
    "at",
    "Equation (2) for one level: L2 distance, not squared, of the attention maps of f_r and raw f_g; mean over B.",
    lambda _config: AttentionTransfer(),
)
