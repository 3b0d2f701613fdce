"""The feature losses, equations (1)-(3) of the paper; norms and reductions run in float32.

`student` levels are f_r, after the regressor's 1x1 convolution; `teacher` levels are f_g as stored. Every loss is a
mean over the batch, so parts of a batch add up when weighted by their counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.config import LossConfig
from dtpipe.manifests.errors import ShapeError

WHITEN_EPS = 1e-5  # of torch's LayerNorm


def whiten(level: Tensor, over: str = "layer") -> Tensor:
    """W of equation (1): LayerNorm without affine parameters over (C, H, W) of each sample, or over C per position.

    Shapes: (B, C, H, W) -> (B, C, H, W), float32.
    """
    level = level.float()
    dims = (1, 2, 3) if over == "layer" else (1,)
    variance, mean = torch.var_mean(level, dim=dims, correction=0, keepdim=True)
    return (level - mean) * torch.rsqrt(variance + WHITEN_EPS)


def regression_loss(student: Tensor, teacher: Tensor, over: str = "layer") -> Tensor:
    """Equation (1) for one level: mean over batch and elements of (f_r - W(f_g))^2.

    Shapes: student, teacher (B, C, H, W) -> scalar float32.
    Raises: ShapeError when the shapes differ.
    """
    _same_shape(student, teacher)
    return F.mse_loss(student.float(), whiten(teacher, over))


def attention_map(level: Tensor) -> Tensor:
    """Q of equation (2): where a level responds, sum of squared activations, scaled to unit length per image.

    Shapes: (B, C, H, W) -> (B, H*W), float32.
    """
    return F.normalize(level.float().square().sum(dim=1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Equation (2) for one level: L2 distance, not squared, of the attention maps of f_r and raw f_g; mean over B.

    Shapes: student (B, Cs, H, W), teacher (B, Ct, H, W) -> scalar float32.
    Raises: ShapeError when the spatial sizes differ.
    Source: Zagoruyko & Komodakis, arXiv 1612.03928, section 3.1, with p = 2.
    """
    if student.shape[-2:] != teacher.shape[-2:]:
        raise ShapeError(
            f"student level is {tuple(student.shape[-2:])}, teacher level is {tuple(teacher.shape[-2:])}; "
            "resize in the regressor, not in the loss"
        )
    difference = attention_map(student) - attention_map(teacher)  # (B, H*W)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=1)  # (B,)
    return distance.mean()


@dataclass(frozen=True)
class FeatureLoss:
    """Equation (3) and its parts; scalars, float32. `levels` maps `mse/l2`, `at/l2`, .. to the terms of each level."""

    total: Tensor
    mse: Tensor
    at: Tensor
    levels: dict[str, Tensor]


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], config: LossConfig) -> FeatureLoss:
    """Equation (3): L_MSE + lambda_AT * L_AT, each a mean over levels that weigh the same.

    Shapes: student[name], teacher[name] (B, C, H, W), the same names.
    Raises: ShapeError when names or shapes differ.
    """
    if set(student) != set(teacher):
        raise ShapeError(f"the regressor gives levels {sorted(student)}, the data {sorted(teacher)}; they must be the same")
    mse = {name: regression_loss(student[name], teacher[name], config.whiten) for name in student}
    at = {name: attention_transfer(student[name], teacher[name]) for name in student}
    mean_mse, mean_at = (torch.stack(list(terms.values())).mean() for terms in (mse, at))
    total = config.mse_weight * mean_mse + config.at_weight * mean_at
    terms = {f"mse/{name}": value.detach() for name, value in mse.items()} | {f"at/{name}": value.detach() for name, value in at.items()}
    return FeatureLoss(total, mean_mse.detach(), mean_at.detach(), terms)


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student level is {tuple(student.shape)}, teacher level is {tuple(teacher.shape)}; "
            "the regressor must map to the teacher's channels and size"
        )
