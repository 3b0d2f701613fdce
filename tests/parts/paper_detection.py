"""Detection as the paper and the projects that it follows have it, by preset; apart from the presets.

A row is {dotted key of `eval`: value}; what it leaves out is the settings' default.
"""

from __future__ import annotations

from typing import Any

import pytest

Row = dict[str, Any]

COCO_IMAGES, BDD_IMAGES = 118_287, 7_000  # of the training splits

_ANY: Row = {
    "task": "detect",
    "labelled": ("all",),
    "seeds": 1,
    "tune.batch_size": 16,
    "tune.schedule": "steps",
    "tune.sync_bn": True,
    "tune.lr_grid": (),
    "tune.backbone_lr": 1.0,
    "tune.augment.flip": 0.5,
    "tune.augment.scale": (1.0, 1.0),
    "tune.augment.crop_px": None,
    "tune.head.width": 256,
    "tune.head.masks": True,
    "tune.head.anchor_scale": 8.0,
    "tune.head.samples": 512,
    "tune.head.max_detections": 100,
}
_COCO: Row = _ANY | {
    "tune.opt": "adamw",
    "tune.head.norm": "batch",
    "tune.head.convs": 4,
    "tune.augment.long_px": 1333,
    "tune.inference.short_px": 800,
    "tune.inference.long_px": 1333,
}


def _shares(*shares: float) -> Any:
    """Shares of a run, as near as a preset writes them."""
    return pytest.approx(shares, rel=1e-5)


def _spark(steps: int) -> Row:
    """SparK's `coco_R_50_FPN_CONV_1x_moco_adam.yaml`, or twice its length."""
    return _COCO | {
        "tune.steps": steps,
        "tune.lr": 2.5e-4,
        "tune.layer_decay": 0.6,
        "tune.layer_groups": (3, 4, 3, 3),
        "tune.weight_decay": 1e-4,
        "tune.gamma": 0.25,
        "tune.milestones": _shares(60_000 / 90_000, 80_000 / 90_000),
        "tune.warmup": 1000 / steps,
        "tune.warmup_start": 0.01,
        "tune.head.cascade": False,
        "tune.augment.short_px": tuple(range(480, 897, 32)),
    }


_IBOT: Row = _COCO | {
    "tune.epochs": 12,
    "tune.lr": 1e-4,
    "tune.layer_decay": 0.65,
    "tune.layer_groups": (3, 3, 3, 3),
    "tune.weight_decay": 0.05,
    "tune.gamma": 0.1,
    "tune.milestones": _shares(8 / 12, 11 / 12),
    "tune.warmup": 1000 / round(12 * COCO_IMAGES / 16),
    "tune.head.cascade": True,
    "tune.augment.short_px": tuple(range(480, 801, 32)),
}
_BDD: Row = _ANY | {
    "tune.epochs": 36,
    "tune.opt": "sgd",
    "tune.lr": 0.02,
    "tune.momentum": 0.9,
    "tune.weight_decay": 1e-4,
    "tune.layer_decay": 1.0,
    "tune.gamma": 0.1,
    "tune.milestones": _shares(24 / 36, 33 / 36),
    "tune.warmup": 500 / (36 * BDD_IMAGES / 16),
    "tune.warmup_start": 1e-3,
    "tune.head.norm": "none",
    "tune.head.convs": 0,
    "tune.head.cascade": False,
    "tune.augment.short_px": tuple(range(600, 721, 24)),
    "tune.augment.long_px": 1280,
    "tune.inference.short_px": 720,
    "tune.inference.long_px": 1280,
}
DETECTION_ROWS: dict[str, Row] = {
    "coco_maskrcnn_r50_1x": _spark(90_000),
    "coco_maskrcnn_r50_2x": _spark(180_000),
    "coco_cascade_convnext_b_1x": _IBOT,
    "bdd_instance_maskrcnn_r50": _BDD,
    "bdd_panoptic_fpn_r50": _BDD
    | {"task": "panoptic", "tune.head.semantic_weight": 0.5, "tune.head.min_stuff_px": 4096},
}
SMALL_DETECTION = ("detect_small", "panoptic_small")
"""Presets of our own, for a CPU."""
DETECTION_FIGURES = {
    "coco_maskrcnn_r50_1x": "44.1 AP of boxes, 40.1 of masks",
    "coco_maskrcnn_r50_2x": "45.1 AP of boxes, 40.8 of masks",
    "coco_cascade_convnext_b_1x": "52.5 AP of boxes, 45.2 of masks",
    "bdd_instance_maskrcnn_r50": "28.3 AP of boxes, 24.8 of masks after ImageNet; 26.7 and 22.9 in-domain",
    "bdd_panoptic_fpn_r50": "21.8 PQ in-domain",
}
"""What the paper reports of a row."""
