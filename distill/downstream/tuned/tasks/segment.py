"""Semantic segmentation: UPerNet on a student's levels, all of it trained."""

from __future__ import annotations

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.reads import UPERNET_READ
from dtpipe.distill.downstream.tuned.segmentation.augment import mask_augment
from dtpipe.distill.downstream.tuned.segmentation.files import save_mask
from dtpipe.distill.downstream.tuned.segmentation.metrics import MIOU, MaskMetric
from dtpipe.distill.downstream.tuned.segmentation.network import build_upernet
from dtpipe.manifests.labels import Mask

TASK = TunedTask(
    "segment",
    "UPerNet, fine-tuned: a class for every pixel.",
    Mask,
    MIOU,
    build_upernet,
    mask_augment,
    lambda classes, _config: MaskMetric(classes),
    save_mask,
    reads=UPERNET_READ,
)
