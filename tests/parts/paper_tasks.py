"""Downstream training as the paper's tables and the recipes that they name have it, by preset; apart from the presets.

A row is {dotted key of `eval`: value}; what it leaves out is the settings' default.
"""

from __future__ import annotations

from typing import Any

from parts.paper_detection import DETECTION_FIGURES, DETECTION_ROWS, SMALL_DETECTION
from parts.paper_segmentation import SEGMENTATION_FIGURES, SEGMENTATION_ROWS

Row = dict[str, Any]

_CLASSES: Row = {
    "task": "finetune",
    "labelled": ("all",),
    "seeds": 1,
    "tune.schedule": "cosine",
    "tune.warmup_start": 0.005,
    "tune.min_lr": 0.001,
    "tune.layer_groups": (3, 2, 3, 3),
    "tune.backbone_lr": 1.0,
    "tune.sync_bn": True,
    "tune.ema_decay": 0.9999,
    "tune.clip_grad": None,
    "tune.augment.crop_px": (224, 224),
    "tune.augment.scale": (0.08, 1.0),
    "tune.augment.policy": "trivial",
    "tune.augment.erasing": 0.25,
    "tune.augment.cutmix": 1.0,
    "tune.augment.smoothing": 0.1,
    "tune.head.dropout": 0.0,
    "tune.inference.short_px": round(224 / 0.95),
}


def _spark(
    batch: int, epochs: int, warmup: int, opt: str, base_lr: float, decay: float, wd: float, mixup: float,
    repeats: int, drop_path: float,
) -> Row:  # fmt: skip
    """A row of SparK's `downstream_imagenet/arg.py`, in its order; lr = base_lr * batch / 256."""
    of_lamb: Row = {"tune.head.loss": "binary"}
    others: Row = {"tune.head.loss": "cross_entropy", "tune.layer_groups": (3, 3, 3, 3)}
    return _CLASSES | {
        "tune.batch_size": batch,
        "tune.epochs": epochs,
        "tune.warmup": warmup / epochs,
        "tune.opt": opt,
        "tune.lr": base_lr * batch / 256,
        "tune.layer_decay": decay,
        "tune.weight_decay": wd,
        "tune.augment.mixup": mixup,
        "tune.augment.repeats": repeats,
        "tune.drop_path": drop_path,
        **(of_lamb if opt == "lamb" else others),
    }


TASK_ROWS: dict[str, Row] = {
    "finetune_resnet50": _spark(2048, 300, 5, "lamb", 0.002, 0.7, 0.02, 0.1, 1, 0.05),
    "finetune_resnet101": _spark(2048, 300, 5, "lamb", 0.001, 0.8, 0.02, 0.1, 1, 0.2),
    "finetune_convnext_small": _spark(4096, 400, 20, "adamw", 0.0002, 0.7, 0.01, 0.8, 3, 0.3),
    "finetune_convnext_base": _spark(4096, 400, 20, "adamw", 0.0001, 0.7, 0.01, 0.8, 3, 0.4),
    "finetune_convnext_large": _spark(4096, 200, 10, "adamw", 0.0001, 0.7, 0.02, 0.8, 3, 0.5),
    "linear_resnet50": {
        "task": "linear",
        "labelled": ("all",),
        "seeds": 1,
        "tune.batch_size": 4096,
        "tune.epochs": 90,
        "tune.opt": "lars",
        "tune.lr": 0.02 * 4096 / 256,
        "tune.momentum": 0.9,
        "tune.weight_decay": 0.0,
        "tune.schedule": "cosine",
        "tune.augment.scale": (0.08, 1.0),
        "tune.augment.crop_px": (224, 224),
        "tune.augment.policy": None,
        "tune.head.dropout": 0.0,
    },
}
TASK_ROWS |= SEGMENTATION_ROWS | DETECTION_ROWS
SMALL_TASKS = ("finetune_small", "segment_small", *SMALL_DETECTION)
"""Presets of our own, for a CPU."""
PAPER_TASKS = {
    "finetune_resnet50": "80.2 top-1",
    "finetune_convnext_base": "83.9 top-1",
    "linear_resnet50": "63.9 top-1",
    **SEGMENTATION_FIGURES,
    **DETECTION_FIGURES,
}
"""What the paper reports of a row."""
