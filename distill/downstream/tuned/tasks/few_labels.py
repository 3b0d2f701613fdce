"""The label-efficient benchmark: UPerNet from a few dozen masks, scored as yandex-research/ddpm-segmentation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from dtpipe.distill.downstream.tuned.base import Example, TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.reads import UPERNET_READ
from dtpipe.distill.downstream.tuned.segmentation.augment import mask_augment
from dtpipe.distill.downstream.tuned.segmentation.files import save_mask
from dtpipe.distill.downstream.tuned.segmentation.metrics import DDPM_MIOU, MaskMetric
from dtpipe.distill.downstream.tuned.segmentation.network import build_upernet
from dtpipe.manifests.labels import ClassTable, Mask, Pixels, Target

SPECK_PX, OF_SIDE_PX = 20, 256
"""A class with fewer pixels in a training image of this side is ignored there; of another size, in proportion."""


def cleaned(mask: Mask) -> Mask:
    """The mask without specks, as the benchmark cleans what is learned from; what is scored is never cleaned."""
    return mask.without_specks(round(SPECK_PX * mask.numbers.size / OF_SIDE_PX**2)) if mask.ignore is not None else mask


def _augment(classes: ClassTable, config: TuneConfig) -> Callable[[Pixels, Target], Example]:
    view = mask_augment(classes, config)
    return lambda pixels, target: view(pixels, cleaned(cast(Mask, target)))


TASK = TunedTask(
    "few-labels",
    "The label-efficient benchmark: UPerNet from a few dozen masks, mIoU as ddpm-segmentation counts it.",
    Mask,
    DDPM_MIOU,
    build_upernet,
    _augment,
    lambda classes, _config: MaskMetric(classes, DDPM_MIOU),
    save_mask,
    reads=UPERNET_READ,
)
