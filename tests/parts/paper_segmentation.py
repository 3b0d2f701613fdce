"""Segmentation as the paper and the projects that it follows have it, by preset; apart from the presets.

A row is {dotted key of `eval`: value}; what it leaves out is the settings' default.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

_ANY: Row = {
    "task": "segment",
    "labelled": ("all",),
    "seeds": 1,
    "tune.epochs": None,
    "tune.schedule": "poly",
    "tune.lr_grid": (),
    "tune.augment.scale": (0.5, 2.0),
    "tune.augment.flip": 0.5,
    "tune.head.norm": "batch",
    "tune.head.dropout": 0.1,
    "tune.head.aux_weight": 0.4,
    "tune.head.width": 512,
    "tune.inference.scales": (1.0,),
    "tune.inference.flips": False,
}
_SGD: Row = _ANY | {
    "tune.opt": "sgd",
    "tune.lr": 0.01,
    "tune.momentum": 0.9,
    "tune.weight_decay": 5e-4,
    "tune.power": 0.9,
    "tune.min_lr": 1e-4 / 0.01,
    "tune.warmup": 0.0,
    "tune.backbone_lr": 1.0,
    "tune.layer_decay": 1.0,
    "tune.drop_path": 0.0,
}
_CONVNEXT: Row = _ANY | {
    "tune.opt": "adamw",
    "tune.lr": 1e-4,
    "tune.betas": (0.9, 0.999),
    "tune.weight_decay": 0.05,
    "tune.power": 1.0,
    "tune.min_lr": 0.0,
    "tune.warmup_start": 1e-6,
    "tune.layer_decay": 0.9,
    "tune.layer_groups": (3, 3, 27, 3),
    "tune.drop_path": 0.4,
}


def _at(short: int, long: int | None, crop: tuple[int, int]) -> Row:
    """Sizes in training and, alike, in scoring."""
    return {
        "tune.augment.short_px": (short,),
        "tune.augment.long_px": long,
        "tune.augment.crop_px": crop,
        "tune.inference.short_px": short,
        "tune.inference.long_px": long,
    }


_MMSEG: Row = {"tune.augment.photometric": True, "tune.augment.max_class_share": 0.75, "tune.sync_bn": True}
_ADE20K: Row = _MMSEG | {"tune.steps": 160_000, "tune.batch_size": 16} | _at(512, 2048, (512, 512))
_CITY: Row = _MMSEG | {"tune.steps": 80_000}
_FEW: Row = {"task": "few-labels", "seeds": 5, "tune.steps": 20_000, "tune.head.width": 256} | _at(
    256, None, (256, 256)
)
SEGMENTATION_ROWS: dict[str, Row] = {
    "ade20k_upernet_r50": _SGD | _ADE20K | {"tune.inference.window_px": None},
    "ade20k_upernet_convnext_b": _CONVNEXT
    | _ADE20K
    | {
        "tune.warmup": 1500 / 160_000,
        "tune.inference.window_px": (512, 512),
        "tune.inference.stride_px": (341, 341),
    },
    "bdd_semantic_upernet_r50": _SGD | _CITY | {"tune.batch_size": 16} | _at(720, 1280, (512, 1024)),
    "cityscapes_upernet_r50": _SGD
    | _CITY
    | {"tune.batch_size": 8, "labelled": (100, 372, 744, "all")}
    | _at(1024, 2048, (512, 1024)),
    "imagenet_foreground_fcn": _SGD
    | {"task": "fcn", "tune.steps": 20_000, "tune.backbone_lr": 0.0, "tune.min_lr": 0.0, "tune.head.stride": None}
    | _at(256, None, (256, 256)),
    "few_labels_convnext_b": _CONVNEXT | _FEW,
    "few_labels_r101": _SGD | _FEW,
}
SEGMENTATION_FIGURES = {
    "ade20k_upernet_r50": "42.5 mIoU",
    "bdd_semantic_upernet_r50": "60.3 mIoU, pre-trained in-domain",
    "cityscapes_upernet_r50": "77.5 mIoU with all, 63.9, 60.0 and 50.0 with fewer",
    "imagenet_foreground_fcn": "79.3 mIoU",
    "few_labels_convnext_b": "Bedroom-28 54.8, FFHQ-34 61.2, Cat-15 58.6, Horse-21 67.6 mIoU after mix distillation",
    "few_labels_r101": "Bedroom-28 49.9, FFHQ-34 59.4, Cat-15 56.7, Horse-21 65.9 mIoU after mix distillation",
}
"""What the paper reports of a row."""
SEGMENTATION_STUDENTS = {"few_labels_r101": "resnet101"} | {
    name: "convnext_base" if "convnext" in name else "resnet50"
    for name in SEGMENTATION_ROWS
    if name != "few_labels_r101"
}
