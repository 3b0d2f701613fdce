"""What a feature loss is: a function of one level's f_r, f_g and W(f_g) that carries its own settings.

f_r is the student's level after the regressor's 1x1 convolution, f_g the teacher's as it was encoded, W(f_g) that level
whitened, float32. Norms and reductions run in float32. Every loss is a mean over the batch: parts of a batch add up
when weighted by their counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dtpipe.distill.config import LossConfig
from dtpipe.manifests.errors import ShapeError


class LevelLoss(Protocol):
    """A loss of one level; its settings are the object's fields."""

    def __call__(self, student: Tensor, teacher: Tensor, white: Tensor) -> Tensor:
        """Shapes: student f_r (B, Cs, H, W), teacher f_g and white W(f_g) (B, Ct, H, W) -> scalar float32, a mean over
        the batch."""


@dataclass(frozen=True)
class LossKind:
    """A loss that settings can name: its weight is `distill.loss.<name>_weight`, a field of `LossConfig`."""

    name: str
    summary: str
    build: Callable[[LossConfig], LevelLoss]


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raises: ShapeError with both shapes when they differ."""
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student level is {tuple(student.shape)}, teacher level is {tuple(teacher.shape)}; "
            "the regressor must map to the teacher's channels and size"
        )
