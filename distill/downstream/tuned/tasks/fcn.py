"""An FCN head on a student's levels; with `backbone_lr` 0, the read-out of foreground in the paper's table 12."""

from __future__ import annotations

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.reads import FCN_READ
from dtpipe.distill.downstream.tuned.segmentation.augment import mask_augment
from dtpipe.distill.downstream.tuned.segmentation.files import save_mask
from dtpipe.distill.downstream.tuned.segmentation.metrics import MIOU, MaskMetric
from dtpipe.distill.downstream.tuned.segmentation.network import build_fcn
from dtpipe.manifests.labels import Mask

TASK = TunedTask(
    "fcn",
    "A few convolutions read a class for every pixel; the backbone frozen by eval.tune.backbone_lr 0.",
    Mask,
    MIOU,
    build_fcn,
    mask_augment,
    lambda classes, _config: MaskMetric(classes),
    save_mask,
    reads=FCN_READ,
)
