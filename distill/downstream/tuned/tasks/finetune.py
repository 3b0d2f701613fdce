"""Classes of whole images, learned by backbone and classifier together.

Source: SparK's `downstream_imagenet` for the recipes that the presets have; timm for their parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from timm.data import Mixup  # type: ignore[attr-defined]  # its documented name
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from dtpipe.distill.downstream.result import ACCURACY
from dtpipe.distill.downstream.tuned.base import Example, LearnTarget, Metric, MixExamples, TaskScores, TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.heads.class_views import class_augmentation
from dtpipe.distill.downstream.tuned.heads.classifier import CLASS, PROBABILITIES, Classifier, soft_targets
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction
from dtpipe.distill.downstream.tuned.reads import CLASSES_READ
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class, ClassTable, Pixels, Target

_TOP = 5


def build_classifier(student: Student, classes: ClassTable, config: TuneConfig) -> nn.Module:
    """Raises: ConfigError for a single class, which a constant answer knows."""
    if len(classes) < 2:
        raise ConfigError(f"all labelled images are of one class, {classes.names[0]}; give a second one")
    return Classifier(student, len(classes), config)


def augment_classes(_classes: ClassTable, config: TuneConfig) -> Callable[[Pixels, Target], Example]:
    """A class is the same in every view."""
    view = class_augmentation(config)
    return lambda image, target: Example(view(image), {CLASS: torch.tensor(cast(Class, target).number)})


def mix_classes(classes: ClassTable, config: TuneConfig) -> MixExamples | None:
    """timm's mixup and CutMix, one of both by a coin for each pass; of an odd number the last image stays as it is."""
    augment = config.augment
    if not augment.mixup and not augment.cutmix:
        return None
    options: dict[str, Any] = {"label_smoothing": augment.smoothing, "num_classes": len(classes)}
    mixup: Any = Mixup(augment.mixup, augment.cutmix, **options)  # type: ignore[no-untyped-call]

    def mix(images: Tensor, targets: Sequence[LearnTarget]) -> tuple[Tensor, Sequence[LearnTarget]]:
        soft = soft_targets(targets, len(classes), augment.smoothing)
        even = len(images) // 2 * 2
        if even:
            numbers = torch.stack([target[CLASS] for target in targets[:even]])
            images = images.clone()
            images[:even], mixed = mixup(images[:even], numbers)
            soft[:even] = mixed.to(soft)
        return images, [{PROBABILITIES: row} for row in soft]

    return mix


class ClassMetric:
    """Top-1 and top-5 accuracy over all images, and the share of each class that is right, by torchmetrics."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        num = len(classes)
        self.top1 = MulticlassAccuracy(num, average="micro")
        self.top5 = MulticlassAccuracy(num, average="micro", top_k=min(_TOP, num))
        self.by_class = MulticlassStatScores(num, average=None)

    def add(self, key: str, prediction: ClassPrediction, target: Target) -> None:  # noqa: ARG002  none is by image
        likely, number = torch.from_numpy(prediction.probabilities)[None], torch.tensor([cast(Class, target).number])
        for part in (self.top1, self.top5, self.by_class):
            part.update(likely, number)

    def merge(self, other: Metric[ClassPrediction]) -> None:
        assert isinstance(other, ClassMetric)
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.merge_state(theirs)

    def _parts(self) -> tuple[MulticlassAccuracy, MulticlassAccuracy, MulticlassStatScores]:
        return self.top1, self.top5, self.by_class

    def scores(self) -> TaskScores:
        counts = self.by_class.compute()  # (K, 5): right, wrongly so called, .., occurrences
        shares = [float(row[0] / row[4]) if row[4] else None for row in counts]
        occurring = [share for share in shares if share is not None]
        others = {"accuracy of the mean class": sum(occurring) / len(occurring)}
        if len(self.classes) > _TOP:
            others["top-5 accuracy"] = float(self.top5.compute())
        by_class = {ACCURACY: dict(zip(self.classes.names, shares, strict=True))}
        return TaskScores(float(self.top1.compute()), others, by_class)


def save_classes(prediction: ClassPrediction, classes: ClassTable) -> Iterator[tuple[str, bytes]]:
    """The likeliest classes with their probabilities, as JSON."""
    order = prediction.probabilities.argsort()[::-1][:_TOP]
    likely = {classes.names[number]: round(float(prediction.probabilities[number]), 6) for number in order}
    yield ".json", json.dumps({"classes": likely}, ensure_ascii=False).encode()


TASK: TunedTask[ClassPrediction] = TunedTask(
    "finetune",
    "from class labels: backbone and linear classifier are trained together; accuracy",
    Class,
    ACCURACY,
    build_classifier,
    augment_classes,
    lambda classes, _config: ClassMetric(classes),
    reads=CLASSES_READ,
    mix=mix_classes,
    save=save_classes,
)
