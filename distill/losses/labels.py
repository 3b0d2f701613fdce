"""Label distillation, equations (5) and (6): the student's logits follow an interpreter's, beside features or alone.

One rule: like every loss here it is a mean over the batch, so parts of a batch add up when weighted by their counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.config import DistillRecipeConfig, LabelsConfig
from dtpipe.distill.labels.targets import Targets
from dtpipe.distill.losses.features import LevelValues, feature_loss, level_values
from dtpipe.distill.losses.whitening import Whitener
from dtpipe.manifests.errors import ShapeError

LABELS_TERM, KEPT = "labels", "kept"
"""Names of the term, and of the share of positions that are sure enough."""


@dataclass(frozen=True)
class LabelLoss:
    """Equation (5), a scalar float32, and the share of positions that it learns from."""

    total: Tensor
    kept: Tensor


def label_loss(student: Tensor, teacher: Tensor, config: LabelsConfig) -> LabelLoss:
    """Cross-entropy of the two distributions softened at tau, without a factor tau^2; mean over positions and batch.

    Positions whose most likely class is less probable than `config.confidence` (at tau 1) add nothing, but count among
    all, so that how sure the others of a batch are changes nothing for a position.

    Shapes: student, teacher (B, K, H, W) logits. Raises: ShapeError when they differ.
    Source: equation (5); the threshold is not in the paper.
    """
    if student.shape != teacher.shape:
        raise ShapeError(
            f"the student's logits are {tuple(student.shape)}, the soft labels {tuple(teacher.shape)}; they must have "
            "the same classes and size"
        )
    student, teacher = student.float(), teacher.float()
    soft = (teacher / config.temperature).softmax(dim=1)
    losses = F.cross_entropy(student / config.temperature, soft, reduction="none")  # (B, H, W)
    sure = torch.ones_like(losses)
    if config.confidence is not None:
        sure = (teacher.softmax(dim=1).amax(dim=1) >= config.confidence).float()
    return LabelLoss((losses * sure).mean(), sure.mean())


def mixed_losses(
    predicted: Mapping[str, Tensor],
    levels: Mapping[str, Tensor],
    targets: Targets,
    config: DistillRecipeConfig,
    level_weights: Mapping[str, float] | None = None,
    whitener: Whitener | None = None,
    compute: LevelValues = level_values,
) -> dict[str, Tensor]:
    """Equation (6) as `loss`, L_feat + lambda_ld * L_ld or one of them, with the terms of both.

    Shapes: predicted[name], levels[name] (B, C, H, W) of the targets.
    Raises: as `feature_loss` and `label_loss`.
    """
    totals: list[Tensor] = []
    terms: dict[str, Tensor] = {}
    if targets.features:
        names = [level.name for level in targets.features]
        student, teacher = ({name: values[name] for name in names} for values in (predicted, levels))
        features = feature_loss(student, teacher, config.loss, level_weights, whitener, compute)
        totals.append(features.total)
        terms |= {**features.terms, **features.levels}
    if targets.labels is not None:
        name = targets.labels.name
        soft = label_loss(predicted[name], levels[name], config.labels)
        totals.append(targets.label_weight * soft.total)
        terms[LABELS_TERM] = terms[f"{LABELS_TERM}/{name}"] = soft.total.detach()
        if config.labels.confidence is not None:
            terms[f"{KEPT}/{name}"] = soft.kept
    return {"loss": torch.stack(totals).sum(), **terms}
