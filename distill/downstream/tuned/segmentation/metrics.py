"""How well masks agree with the truth, over all pixels of all held-out images.

Counts are kept, not predictions, so that memory does not grow with the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric as TorchMetric
from torchmetrics.classification import BinaryAveragePrecision, MulticlassJaccardIndex
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.result import FOREGROUND_AP
from dtpipe.distill.downstream.tuned.base import Metric, TaskScores
from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.distill.downstream.tuned.segmentation.augment import mask_tensor
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.labels import ClassTable, Mask, Target

MIOU = "mIoU"
DDPM_MIOU = "mIoU as ddpm-segmentation"
_THRESHOLDS = torch.cat([torch.zeros(1), torch.linspace(-16, 16, 8193, dtype=torch.float64).sigmoid().float()])
"""Probabilities at which foreground is cut, evenly spaced in the logit: trained networks are sure of most pixels."""


class MaskMetric:
    """mIoU by torchmetrics, where a class that is neither there nor predicted counts nowhere; pixel accuracy; of two
    classes, IoU and average precision of the second.

    A class whose number is the ignore value, as ddpm-segmentation's background of bedrooms, is left out of means.
    """

    def __init__(self, classes: ClassTable, headline: str = MIOU) -> None:
        """headline: which of the scores is the value, `MIOU` or `DDPM_MIOU`."""
        self.classes, self.headline = classes, headline
        self.left_out: int | None = None
        num = len(classes)
        self.confusion = torch.zeros(num, num, dtype=torch.int64)  # true, predicted
        self.stray = torch.zeros(num, dtype=torch.int64)  # predicted where the truth is ignored
        self.levels = torch.zeros(2, len(_THRESHOLDS) + 1, dtype=torch.int64)  # pixels by truth and threshold reached

    def add(self, key: str, prediction: MaskPrediction, target: Target) -> None:
        """Raises: ShapeError naming an image whose mask has another size than its prediction."""
        mask, num = cast(Mask, target), len(self.classes)
        truth, predicted = mask_tensor(mask, self.classes), torch.from_numpy(prediction.numbers.astype(np.int64))
        if truth.shape != predicted.shape:
            raise ShapeError(f"{key}: the mask is {tuple(truth.shape)} px, what was seen {tuple(predicted.shape)} px")
        if mask.ignore is not None and 0 <= mask.ignore < num:
            self.left_out = mask.ignore
        self.confusion += multiclass_confusion_matrix(
            predicted.flatten(), truth.flatten(), num, ignore_index=IGNORE, validate_args=False
        )
        known = truth != IGNORE
        self.stray += torch.bincount(predicted[~known], minlength=num)
        if prediction.foreground is not None:
            reached = torch.bucketize(torch.from_numpy(prediction.foreground)[known].float(), _THRESHOLDS, right=True)
            places = truth[known] * self.levels.shape[1] + reached
            self.levels += torch.bincount(places, minlength=self.levels.numel()).view_as(self.levels)

    def merge(self, other: Metric[MaskPrediction]) -> None:
        """Take in the counts of another."""
        assert isinstance(other, MaskMetric)
        self.confusion += other.confusion
        self.stray += other.stray
        self.levels += other.levels
        self.left_out = self.left_out if other.left_out is None else other.left_out

    def scores(self) -> TaskScores:
        """Raises: ConfigError when no pixel counts."""
        if not int(self.confusion.sum()):
            raise ConfigError("no pixel of the held-out masks counts: all are ignored; give other masks")
        means = {
            MIOU: float(self._jaccard("macro")),
            DDPM_MIOU: ddpm_iou(self.confusion, self.stray, self.left_out),
            "pixel accuracy": int(self.confusion.diagonal().sum()) / int(self.confusion.sum()),
        }
        others = means | self._foreground()
        value = others.pop(self.headline)
        if self._rules_agree():
            others.pop(DDPM_MIOU, None)
        return TaskScores(value, others, {"IoU": self._by_class(self._jaccard("none").tolist())})

    def _rules_agree(self) -> bool:
        """Whether no mask tells the two rules apart: no pixel is ignored, and every class is there."""
        return not int(self.stray.sum()) and bool((self.confusion.sum(dim=1) > 0).all())

    def _jaccard(self, average: Literal["macro", "none"]) -> Tensor:
        metric = MulticlassJaccardIndex(
            len(self.classes), average=average, ignore_index=self.left_out, validate_args=False
        )
        return _computed(metric, self.confusion)

    def _by_class(self, ious: Sequence[float]) -> dict[str, float | None]:
        """None for what is neither there nor predicted, and for the class that is left out."""
        seen = self.confusion.sum(dim=0) + self.confusion.sum(dim=1)
        absent = [not count or idx == self.left_out for idx, count in enumerate(seen.tolist())]
        return {name: None if out else iou for name, iou, out in zip(self.classes.names, ious, absent, strict=True)}

    def _foreground(self) -> dict[str, float]:
        """Scores of the second of two classes; without average precision where it does not occur."""
        if len(self.classes) != 2 or self.left_out is not None:
            return {}
        iou = {"foreground IoU": float(self._jaccard("none")[1])}
        reached = self.levels.flip(1).cumsum(1).flip(1)[:, 1:]  # (2, T): pixels of each truth at or above a threshold
        if not reached[1, 0]:
            return iou
        below = self.levels.sum(dim=1, keepdim=True) - reached
        state = torch.stack([torch.stack([below[idx], reached[idx]], dim=1) for idx in (0, 1)], dim=1)  # (T, 2, 2)
        precision = BinaryAveragePrecision(thresholds=_THRESHOLDS, validate_args=False)
        return iou | {FOREGROUND_AP: float(_computed(precision, state))}


def ddpm_iou(confusion: Tensor, stray: Tensor, left_out: int | None = None) -> float:
    """Mean IoU over all classes but one that is ignored, as ddpm-segmentation has it.

    Intersections and unions are sums over all images; a class that occurs nowhere has 0; predictions where the truth is
    ignored count in the union of their class.
    Source: yandex-research/ddpm-segmentation, src/pixel_classifier.py.

    Shapes: confusion (K, K) of (true, predicted), stray (K,) pixels predicted on ignored ones.
    """
    hits = confusion.diagonal().double()
    unions = confusion.sum(dim=0) + stray + confusion.sum(dim=1) - hits
    ious = hits / (1e-8 + unions)
    return float(ious[[idx for idx in range(len(ious)) if idx != left_out]].mean())


def _computed(metric: TorchMetric, counts: Tensor) -> Tensor:
    """What a metric of torchmetrics says of counts that were added up elsewhere."""
    none = torch.zeros(0, dtype=torch.int64)
    metric.update(none.float() if isinstance(metric, BinaryAveragePrecision) else none, none)
    metric.merge_state({"confmat": counts})
    value: Tensor = metric.compute()
    return value
