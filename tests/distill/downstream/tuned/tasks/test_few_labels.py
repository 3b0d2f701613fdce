"""Training masks of the label-efficient benchmark are cleaned of specks as published."""

from __future__ import annotations

import numpy as np
import torch

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.tuned.config import AugmentConfig, TuneConfig
from dtpipe.distill.downstream.tuned.segmentation.metrics import DDPM_MIOU
from dtpipe.distill.downstream.tuned.tasks.few_labels import TASK, without_specks
from dtpipe.manifests.labels import ClassTable, Mask


def test_classes_of_fewer_than_20_px_are_ignored_and_no_others() -> None:
    numbers = np.zeros((10, 10), np.uint8)
    numbers[0], numbers[1], numbers[2, :9], numbers[3, 0] = 1, 1, 2, 255  # 20 px, 9 px, and one that is ignored
    cleaned = without_specks(Mask(numbers))
    assert np.unique(cleaned.numbers[2, :9]).tolist() == [255]
    assert np.array_equal(np.delete(cleaned.numbers, 2, axis=0), np.delete(numbers, 2, axis=0))
    assert without_specks(Mask(numbers, ignore=0)).numbers[2].tolist() == [0] * 10  # bedroom-28's background


def test_training_sees_cleaned_masks_and_scores_are_the_benchmarks() -> None:
    numbers = np.zeros((10, 10), np.uint8)
    numbers[0, :5] = 1
    config = TuneConfig(steps=1, augment=AugmentConfig(flip=0))
    example = TASK.augment(ClassTable.numbered(2), config)(np.zeros((10, 10, 3), np.uint8), Mask(numbers))
    assert torch.unique(example.target["mask"]).tolist() == [IGNORE, 0]
    assert TASK.metric_name == TASK.metric(ClassTable.numbered(2), config).headline == DDPM_MIOU
