"""One linear classifier on the pooled features of the backbone's last level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.distill.downstream.tuned.base import LearnTarget
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.heads.class_views import ClassView
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction
from dtpipe.distill.student.student import Student, model_options

CLASS = "class"
"""Target: the class number, int64 scalar."""
PROBABILITIES = "probabilities"
"""Target after mixing: how much of each class, (K,) float32."""


class Classifier(nn.Module):
    """A student with a norm, dropout and a linear layer on the mean over the positions of its last level."""

    def __init__(self, student: Student, num_classes: int, config: TuneConfig) -> None:
        super().__init__()
        self.student, self.config = student, config
        width = student.channels[-1]
        self.norm = pooled_norm(student, config, width)
        self.dropout = nn.Dropout(config.head.dropout)
        self.linear = nn.Linear(width, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.view = ClassView(config)

    def logits(self, images: Tensor) -> Tensor:
        """Shapes: images (B, 3, H, W) in [-1, 1] -> (B, K)."""
        pooled = self.student(images)[-1].mean(dim=(2, 3))  # (B, C)
        logits: Tensor = self.linear(self.dropout(self.norm(pooled)))
        return logits

    def forward(self, images: Sequence[Tensor], targets: Sequence[LearnTarget]) -> Mapping[str, Tensor]:
        """The cross-entropy that the settings name, and the share of images whose likeliest class is right."""
        logits = self.logits(torch.stack(list(images))).float()
        wanted = soft_targets(targets, logits.shape[1], self.config.augment.smoothing)
        if self.config.head.loss == "binary":
            loss = F.binary_cross_entropy_with_logits(logits, wanted)
        else:
            loss = F.cross_entropy(logits, wanted)
        right = (logits.argmax(dim=1) == wanted.argmax(dim=1)).float().mean()
        return {"loss": loss, "accuracy": right}

    def predict(self, images: Sequence[Tensor]) -> Sequence[ClassPrediction]:
        """Probabilities of whole images, each brought to the size of training first.

        Under binary cross-entropy the classes' own probabilities, which do not add up to 1.
        """
        seen = torch.stack([self.view(image) for image in images])
        with torch.no_grad():
            logits = self.logits(seen).float()
            if self.config.inference.flips:
                logits = (logits + self.logits(seen.flip(-1)).float()) / 2
        likely = logits.sigmoid() if self.config.head.loss == "binary" else logits.softmax(dim=1)
        return [ClassPrediction(row) for row in likely.cpu().numpy()]


def soft_targets(targets: Sequence[LearnTarget], num_classes: int, smoothing: float) -> Tensor:
    """How much of each class, as timm smooths it; mixed targets are as they are. Shapes: -> (B, K) float32."""
    if PROBABILITIES in targets[0]:
        return torch.stack([target[PROBABILITIES] for target in targets])
    numbers = torch.stack([target[CLASS] for target in targets])
    hot = F.one_hot(numbers, num_classes).float()
    return hot * (1 - smoothing) + smoothing / num_classes


def pooled_norm(student: Student, config: TuneConfig, width: int) -> nn.Module:
    """The norm that stands before the linear layer."""
    kind = config.head.pooled_norm
    if kind == "auto":
        kind = "layer" if _timm_has_norm(student) else "none"
    if kind == "layer":
        return nn.LayerNorm(width, eps=1e-6)
    return nn.BatchNorm1d(width, affine=False, eps=1e-6) if kind == "batch" else nn.Identity()


def _timm_has_norm(student: Student) -> bool:
    """Whether timm's classifier of the model normalises what it pooled, as ConvNeXt's does."""
    with torch.device("meta"):
        full: Any = timm.create_model(student.spec.name, num_classes=2, **model_options(student.spec))
    return isinstance(getattr(getattr(full, "head", None), "norm", None), nn.LayerNorm)
