"""The feature losses, equations (1)-(3) of the paper; norms and reductions run in float32.

Another loss is a function here, its line in `LOSSES`, and its weight in `LossConfig`. `student` levels are f_r, after the
regressor's 1x1 convolution; `teacher` levels are f_g as stored. Every loss is a mean over the batch, so parts of a batch
add up when weighted by their counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.config import LossConfig
from dtpipe.manifests.errors import ConfigError, ShapeError

WHITEN_EPS = 1e-5  # of torch's LayerNorm


def whiten(level: Tensor, over: str = "layer") -> Tensor:
    """W of equation (1): LayerNorm without affine parameters over (C, H, W) of each sample ("layer"); "channel": over C
    at each position; "none": the level as it is.

    Shapes: (B, C, H, W) -> (B, C, H, W), float32.
    """
    level = level.float()
    if over == "none":
        return level
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


def attention_transfer(student: Tensor, teacher: Tensor, _over: str = "none") -> Tensor:
    """Equation (2) for one level: L2 distance, not squared, of the attention maps of f_r and raw f_g; mean over B.

    Both are taken as they are, whatever the whitening of the other losses.

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


def cosine_distance(student: Tensor, teacher: Tensor, over: str = "layer") -> Tensor:
    """1 - cos(f_r, W(f_g)) of the C values at each position of one level; mean over positions and batch. 0 to 2.

    Shapes: student, teacher (B, C, H, W) -> scalar float32.
    Raises: ShapeError when the shapes differ.
    Differs: not in the paper; blind to the strength of both, so that no position outweighs another.
    """
    _same_shape(student, teacher)
    return 1 - F.cosine_similarity(student.float(), whiten(teacher, over), dim=1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "mse": regression_loss,
    "at": attention_transfer,
    "cosine": cosine_distance,
}
"""Losses of one level, as functions of f_r, f_g and `whiten`; each has a weight `<name>_weight` in LossConfig."""


@dataclass(frozen=True)
class FeatureLoss:
    """Equation (3) and its parts; scalars, float32. Losses of weight 0 are not computed and have no entry."""

    total: Tensor
    terms: dict[str, Tensor]
    """`mse`, `at`, .. over all levels, before their weights."""
    levels: dict[str, Tensor]
    """`mse/l2`, `at/l2`, .. of each level."""


def feature_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    config: LossConfig,
    level_weights: Mapping[str, float] | None = None,
) -> FeatureLoss:
    """Equation (3): L_MSE + lambda_AT * L_AT, each a mean over the levels; with `level_weights`, a weighted mean.

    A level without a weight weighs 1. Only the ratios count: each loss stays on the scale of one level.

    Shapes: student[name], teacher[name] (B, C, H, W), the same names.
    Raises: ShapeError when names or shapes differ; ConfigError when the weights name no level, or leave none.
    """
    if set(student) != set(teacher):
        raise ShapeError(
            f"the regressor gives levels {sorted(student)}, the data {sorted(teacher)}; they must be the same"
        )
    shares = _level_shares(list(student), level_weights or {})
    terms: dict[str, Tensor] = {}
    levels: dict[str, Tensor] = {}
    for loss, weight in config.weights.items():
        if weight > 0:
            values = {name: LOSSES[loss](student[name], teacher[name], config.whiten) for name in student}
            terms[loss] = torch.stack([share * values[name] for name, share in shares.items()]).sum()
            levels |= {f"{loss}/{name}": value.detach() for name, value in values.items()}
    total = torch.stack([config.weights[loss] * term for loss, term in terms.items()]).sum()
    return FeatureLoss(total, {loss: term.detach() for loss, term in terms.items()}, levels)


def _level_shares(levels: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Each level's share of the mean; they add up to 1."""
    total = sum(weights.get(name, 1.0) for name in levels)
    if not set(weights) <= set(levels) or min(weights.values(), default=1.0) < 0 or total <= 0:
        raise ConfigError(
            f"level weights {dict(weights)} do not fit levels {list(levels)}; give weights of 0 or more, not all 0, to those"
        )
    return {name: weights.get(name, 1.0) / total for name in levels}


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student level is {tuple(student.shape)}, teacher level is {tuple(teacher.shape)}; "
            "the regressor must map to the teacher's channels and size"
        )
