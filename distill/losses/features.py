"""The feature loss, equation (3): losses of single levels, averaged over the levels and added by their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtpipe.distill.config import LossConfig
from dtpipe.distill.losses.base import LevelLoss
from dtpipe.distill.losses.fit import ERROR, SPREAD
from dtpipe.distill.losses.registry import LOSSES
from dtpipe.distill.losses.whitening import Whitener
from dtpipe.manifests.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class FeatureLoss:
    """Equation (3) and its parts; scalars, float32. Losses of weight 0 are not computed and have no entry."""

    total: Tensor
    terms: dict[str, Tensor]
    """`mse`, `at`, .. over all levels, before their weights."""
    levels: dict[str, Tensor]
    """`mse/l2`, `at/l2`, .. of each level; and `spread/l2`, the squared error of a constant, where that is known."""


def level_values(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    losses: Mapping[str, LevelLoss],
    whitener: Whitener,
) -> dict[str, Tensor]:
    """What is computed of levels: `mse/l2` by loss and level, and `spread/l2` where that is known; scalars, float32.

    One rule: it is tensors and plain records only, so that torch.compile makes few passes over each level of it.

    Shapes: student[name], teacher[name] (B, C, H, W), the same names. Raises: ShapeError when shapes differ.
    """
    values = {}
    for name, level in teacher.items():
        level, predicted = level.float(), student[name].float()
        white = whitener(name, level)
        for loss, compute in losses.items():
            values[f"{loss}/{name}"] = compute(predicted, level, white)
        spread = whitener.spread(name, white) if ERROR in losses else None
        if spread is not None:
            values[f"{SPREAD}/{name}"] = spread
    return values


LevelValues = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, LevelLoss], Whitener], dict[str, Tensor]
]
"""`level_values`, or what torch.compile makes of it."""


def feature_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    config: LossConfig,
    level_weights: Mapping[str, float] | None = None,
    whitener: Whitener | None = None,
    compute: LevelValues = level_values,
) -> FeatureLoss:
    """Equation (3): L_MSE + lambda_AT * L_AT, each a mean over the levels; with `level_weights`, a weighted mean.

    A level without a weight weighs 1. Only the ratios count: each loss stays on the scale of one level. `whitener` is
    that of the config, with what is known of the dataset.

    Shapes: student[name], teacher[name] (B, C, H, W), the same names.
    Raises: ShapeError when names or shapes differ; ConfigError when the weights name no level, or leave none.
    """
    if set(student) != set(teacher):
        raise ShapeError(
            f"the regressor gives levels {sorted(student)}, the data {sorted(teacher)}; they must be the same"
        )
    shares = _level_shares(list(student), level_weights or {})
    weights = {loss: weight for loss, weight in config.weights.items() if weight > 0}
    losses = {loss: LOSSES[loss].build(config) for loss in weights}
    values = compute(student, teacher, losses, whitener or Whitener(config.whiten))
    terms = {
        loss: torch.stack([share * values[f"{loss}/{name}"] for name, share in shares.items()]).sum() for loss in losses
    }
    total = torch.stack([weight * terms[loss] for loss, weight in weights.items()]).sum()
    return FeatureLoss(
        total,
        {loss: term.detach() for loss, term in terms.items()},
        {name: value.detach() for name, value in values.items()},
    )


def _level_shares(levels: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Each level's share of the mean; they add up to 1."""
    total = sum(weights.get(name, 1.0) for name in levels)
    if not set(weights) <= set(levels) or min(weights.values(), default=1.0) < 0 or total <= 0:
        raise ConfigError(
            f"level weights {dict(weights)} do not fit levels {list(levels)}; "
            "give weights of 0 or more, not all 0, to those"
        )
    return {name: weights.get(name, 1.0) / total for name in levels}
