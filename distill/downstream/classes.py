"""Classes of whole images as networks and classifiers name them: how many are right, and what is kept of each image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from dtpipe.distill.downstream.result import ACCURACY
from dtpipe.distill.downstream.tuned.base import Metric, TaskScores
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction
from dtpipe.manifests.labels import Class, ClassTable, Target

_TOP = 5


class ClassMetric:
    """Top-1 and top-5 accuracy over all images, and the share of each class that is right, by torchmetrics."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        num = len(classes)
        self.top1 = MulticlassAccuracy(num, average="micro")
        self.top5 = MulticlassAccuracy(num, average="micro", top_k=min(_TOP, num))
        self.by_class = MulticlassStatScores(num, average=None)

    def add(self, key: str, prediction: ClassPrediction, target: Target) -> None:  # noqa: ARG002  none is by image
        self.add_all(torch.from_numpy(prediction.probabilities)[None], torch.tensor([cast(Class, target).number]))

    def add_all(self, probabilities: Tensor, numbers: Tensor) -> None:
        """Take in several images. Shapes: (N, K), (N,) int64."""
        for part in self._parts():
            part.update(probabilities, numbers)

    def merge(self, other: Metric[ClassPrediction]) -> None:
        assert isinstance(other, ClassMetric)
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.merge_state(theirs)

    def _parts(self) -> tuple[MulticlassAccuracy, MulticlassAccuracy, MulticlassStatScores]:
        return self.top1, self.top5, self.by_class

    def scores(self) -> TaskScores:
        counts = self.by_class.compute()  # (K, 5): right, wrongly so called, .., occurrences
        shares = [float(row[0]) / float(row[4]) if row[4] else None for row in counts]
        occurring = [share for share in shares if share is not None]
        others = {"accuracy of the mean class": sum(occurring) / len(occurring)}
        if len(self.classes) > _TOP:
            others["top-5 accuracy"] = self.top5.compute().item()
        by_class = {ACCURACY: dict(zip(self.classes.names, shares, strict=True))}
        return TaskScores(float(self.top1.compute()), others, by_class)


def save_classes(prediction: ClassPrediction, classes: ClassTable) -> Iterator[tuple[str, bytes]]:
    """The likeliest classes with their probabilities, as JSON."""
    order = prediction.probabilities.argsort()[::-1][:_TOP]
    likely = {classes.names[number]: round(float(prediction.probabilities[number]), 6) for number in order}
    yield ".json", json.dumps({"classes": likely}, ensure_ascii=False).encode()
