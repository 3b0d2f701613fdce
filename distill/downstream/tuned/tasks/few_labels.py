"""The label-efficient benchmark: UPerNet from a few dozen masks, scored as yandex-research/ddpm-segmentation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from dtpipe.distill.downstream.tuned.base import Example, TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.segmentation.augment import mask_augment
from dtpipe.distill.downstream.tuned.segmentation.files import save_mask
from dtpipe.distill.downstream.tuned.segmentation.metrics import DDPM_MIOU, MaskMetric
from dtpipe.distill.downstream.tuned.segmentation.network import build_upernet
from dtpipe.manifests.labels import IGNORE_VALUE, ClassTable, Mask, Pixels, Target

SPECK_PX = 20
"""A class with fewer pixels in a training image is ignored there."""


def without_specks(mask: Mask) -> Mask:
    """The mask with classes of fewer than `SPECK_PX` pixels ignored; what is scored is never cleaned.

    Source: yandex-research/ddpm-segmentation, train_interpreter.py.
    """
    ignore = IGNORE_VALUE if mask.ignore is None else mask.ignore
    numbers, counts = np.unique(mask.numbers, return_counts=True)
    specks = np.isin(mask.numbers, numbers[counts < SPECK_PX])
    return Mask(np.where(specks, ignore, mask.numbers), ignore)


def _augment(classes: ClassTable, config: TuneConfig) -> Callable[[Pixels, Target], Example]:
    view = mask_augment(classes, config)
    return lambda pixels, target: view(pixels, without_specks(cast(Mask, target)))


TASK = TunedTask(
    "few-labels",
    "The label-efficient benchmark: UPerNet from a few dozen masks, mIoU as ddpm-segmentation counts it.",
    Mask,
    DDPM_MIOU,
    build_upernet,
    _augment,
    lambda classes, _config: MaskMetric(classes, DDPM_MIOU),
    save_mask,
)
