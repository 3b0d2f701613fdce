"""Classes of whole images, learned by backbone and classifier together.

Source: SparK's `downstream_imagenet` for the recipes that the presets have; timm for their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.data import Mixup  # type: ignore[attr-defined]  # its documented name
from torch import Tensor, nn

from dtpipe.distill.downstream.classes import ClassMetric, save_classes
from dtpipe.distill.downstream.result import ACCURACY
from dtpipe.distill.downstream.tuned.base import Example, LearnTarget, MixExamples, TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.heads.class_views import class_augmentation
from dtpipe.distill.downstream.tuned.heads.classifier import CLASS, PROBABILITIES, Classifier, soft_targets
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction
from dtpipe.distill.downstream.tuned.reads import CLASSES_READ
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class, ClassTable, Pixels, Target


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
