"""Tuned networks as predictors: trainings of a few steps, and networks that see bright things without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dtpipe.distill.downstream.extractors import random_student
from dtpipe.distill.downstream.tuned.load import TunedModel
from dtpipe.distill.downstream.tuned.predictions import Detections, PanopticPrediction
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.run import tune
from dtpipe.distill.export.predictor import write_predictor
from dtpipe.distill.student.student import Student
from dtpipe.manifests.labels import ClassTable
from parts.tuning import STUDENT, bright_halves, tune_config, tune_job

THINGS = ClassTable(("lamp", "window"), numbers={0: 7, 1: 90})
SEGMENTS = ClassTable(("lamp", "window", "ground"), things=frozenset({0, 1}))


def train_cell(folder: Path, task: str, **settings: Any) -> Path:
    """The folder of a training of six steps."""
    images = bright_halves(8, 0, masked=task == "segment")
    job = tune_job(tune_config(head={"width": 8}, **settings), images, task)
    tune(job, bright_halves(2, 1, masked=task == "segment"), folder, "cpu")
    return folder


class SeesBright(nn.Module):
    """Finds the red rectangle (class 0) and the blue one (class 1) of a dark image, as Mask R-CNN would say them."""

    def __init__(self, student: Student, panoptic: bool) -> None:
        super().__init__()
        self.student, self.panoptic = student, panoptic

    def predict(self, images: Sequence[Tensor]) -> list[Any]:
        return [self._panoptic(image) if self.panoptic else self._objects(image) for image in images]

    def _masks(self, image: Tensor) -> np.ndarray:
        return np.stack([(image[channel] > 0.5).numpy() for channel in (0, 2)])

    def _objects(self, image: Tensor) -> Detections:
        masks = self._masks(image)
        seen = np.flatnonzero(masks.any(axis=(1, 2)))
        corners = [np.argwhere(masks[number])[:, ::-1] for number in seen]
        boxes = [[*points.min(axis=0), *(points.max(axis=0) + 1)] for points in corners]
        scores = np.linspace(0.9, 0.3, len(seen)).astype(np.float32)
        return Detections(tuple(image.shape[1:]), np.array(boxes, np.float32).reshape(-1, 4), seen, scores, masks[seen])

    def _panoptic(self, image: Tensor) -> PanopticPrediction:
        segments = np.full(image.shape[1:], 300, np.int32)  # an id that needs two bytes
        classes = {300: 2}
        for number, mask in enumerate(self._masks(image)):
            if mask.any():
                segments[mask] = 1 + number
                classes[1 + number] = number
        return PanopticPrediction(segments, classes)


def seeing_bright(task: str) -> Any:
    """The task with that network in place of its own; all else is the task's."""
    return replace(find_tuned(task), build=lambda student, _classes, _config: SeesBright(student, task == "panoptic"))


def write_untrained(folder: Path, task: str, classes: ClassTable, **settings: Any) -> Path:
    """A predictor with random weights."""
    folder.mkdir(parents=True)
    config, entry = tune_config(**settings), find_tuned(task)
    torch.manual_seed(0)
    network = entry.build(random_student(STUDENT, 0), classes, config).eval()
    write_predictor(TunedModel(entry, network, classes, config), folder)
    return folder
