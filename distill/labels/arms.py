"""What is scored on held-out images: the interpreter, or a rival, as a function from one image's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtpipe.distill.downstream.classes import ClassMetric
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction, MaskPrediction
from dtpipe.distill.downstream.tuned.segmentation.metrics import MaskMetric
from dtpipe.distill.labels.data import LabelledFeatures
from dtpipe.distill.labels.interpreter import FeatureInterpreter
from dtpipe.distill.student.blocks import resize
from dtpipe.manifests.labels import Class
from dtpipe.manifests.phases import counted

ArmPrediction = MaskPrediction | ClassPrediction
Predict = Callable[[Mapping[str, Tensor], tuple[int, int]], Any]
"""Features of one image {level: (1, V * C, h, w)} on the device and its size in px -> `ArmPrediction`."""


@dataclass(frozen=True)
class ArmScore:
    """What one arm says of held-out images."""

    name: str
    value: float
    """mIoU of masks, accuracy of classes."""
    others: Mapping[str, float]
    by_class: Mapping[str, float | None]
    """IoU, or the share that is right; None where a class does not occur."""
    drawn: Sequence[ArmPrediction] = field(default=(), repr=False)
    """Predictions of the first images."""

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "others": dict(self.others), "by_class": dict(self.by_class)}


def interpreter_predict(network: FeatureInterpreter, size_known: bool) -> Predict:
    """An interpreter as an arm: logits brought to the image's size, bilinear; `size_known`: of masks."""

    @torch.inference_mode()
    def predict(levels: Mapping[str, Tensor], size: tuple[int, int]) -> ArmPrediction:
        logits = network(levels)
        return mask_prediction(resize(logits, size)[0]) if size_known else class_prediction(logits.flatten(1)[0])

    return predict


def mask_prediction(logits: Tensor) -> MaskPrediction:
    """Shapes: (K, H, W)."""
    foreground = logits.softmax(dim=0)[1].cpu().numpy() if len(logits) == 2 else None
    return MaskPrediction(logits.argmax(dim=0).cpu().numpy(), foreground)


def class_prediction(logits: Tensor) -> ClassPrediction:
    """Shapes: (K,)."""
    return ClassPrediction(logits.softmax(dim=0).cpu().numpy().astype(np.float32))


def score_arm(name: str, predict: Predict, test: LabelledFeatures, device: torch.device, num_drawn: int) -> ArmScore:
    """Score an arm image by image, at its own size, unflipped. Raises: ConfigError where no held-out pixel counts."""
    classes = test.labelled.classes
    metric: Any = ClassMetric(classes) if test.labelled.kind is Class else MaskMetric(classes)
    drawn = []
    for row, key in enumerate(counted(test.labelled.keys, len(test.labelled), f"scoring {name}")):
        levels = {level: values[None].to(device) for level, values in test.read(row, 0, False).items()}
        target = test.labelled.target(row)
        size = (1, 1) if isinstance(target, Class) else test.labelled.image(row).shape[:2]
        prediction = predict(levels, (int(size[0]), int(size[1])))
        metric.add(key, prediction, target)
        if row < num_drawn:
            drawn.append(prediction)
    scores = metric.scores()
    (by_class,) = scores.by_class.values()
    return ArmScore(name, scores.value, scores.others, by_class, drawn)
