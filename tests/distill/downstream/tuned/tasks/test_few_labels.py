"""Training masks of the label-efficient benchmark are cleaned of specks as published, and scored by its rule."""

from __future__ import annotations

import numpy as np
import torch

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.tuned.config import AugmentConfig, TuneConfig
from dtpipe.distill.downstream.tuned.segmentation.metrics import DDPM_MIOU
from dtpipe.distill.downstream.tuned.tasks.few_labels import TASK, cleaned
from dtpipe.manifests.labels import ClassTable, Mask


def test_classes_of_fewer_than_20_px_of_a_256_px_image_are_ignored() -> None:
    numbers = np.zeros((256, 256), np.uint8)
    numbers[0, :20], numbers[1, :19] = 1, 2
    assert cleaned(Mask(numbers)).occurring == {0, 1}
    assert cleaned(Mask(numbers, ignore=0)).numbers[1].max() == 0  # bedroom-28's background is what is ignored
    twice = np.kron(numbers, np.ones((2, 2), np.uint8))  # the same masks at 512 px
    assert cleaned(Mask(twice)).occurring == {0, 1}
    assert cleaned(Mask(numbers, ignore=None)).occurring == {0, 1, 2}


def test_training_sees_cleaned_masks_and_scores_are_the_benchmarks() -> None:
    numbers = np.zeros((256, 256), np.uint8)
    numbers[0, :5] = 1
    config = TuneConfig(steps=1, augment=AugmentConfig(flip=0))
    example = TASK.augment(ClassTable.numbered(2), config)(np.zeros((256, 256, 3), np.uint8), Mask(numbers))
    assert torch.unique(example.target["mask"]).tolist() == [IGNORE, 0]
    assert TASK.metric_name == TASK.metric(ClassTable.numbered(2), config).headline == DDPM_MIOU
