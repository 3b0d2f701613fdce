"""Exports that torchvision's detectors load, Mask R-CNN among them: the backbone below `backbone.body.`.

The pyramid and the heads are new. Of a ConvNeXt, which torchvision has no detector of, it is the `features` that
`BackboneWithFPN` takes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone

from dtpipe.distill.export.base import ExportFormat, Reloaded, stage_outputs
from dtpipe.distill.export.torchvision import CONVNEXTS, check, to_torchvision
from dtpipe.distill.student.student import Student, normalisation, untagged

PREFIX = "backbone."
"""Of the backbone in a detector."""
_LAYERS = {"1": "0", "3": "1", "5": "2", "7": "3"}  # of ConvNeXt's features: what the pyramid takes


def to_body(name: str, weight: Tensor, student: Student) -> tuple[str, Tensor] | None:
    """The name in a detector; None for the norm before a classifier."""
    theirs, shaped = to_torchvision(name, weight, student)
    if theirs.startswith("classifier"):
        return None
    return f"{PREFIX}body.{theirs.removeprefix('features.')}", shaped


def reload(path: Path, student: Student) -> Reloaded:
    """The body of a clean backbone with a pyramid."""
    name = untagged(student.spec.name)
    backbone: Any
    if name in CONVNEXTS:
        features = getattr(torchvision.models, name)().features
        backbone = BackboneWithFPN(features, _LAYERS, list(student.channels[-4:]), 256)
    else:
        backbone = resnet_fpn_backbone(
            backbone_name=name, weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5
        )
    weights = {key.removeprefix(f"{PREFIX}body."): weight for key, weight in load_file(path).items()}
    backbone.body.load_state_dict(weights)
    return partial(stage_outputs, list(backbone.eval().body.children()))


def finetune(path: Path, student: Student) -> str:
    """Mask R-CNN of five classes, background among them."""
    mean, std = normalisation(student.spec.name)
    return (
        f"import torch, torchvision\nfrom safetensors.torch import load_file\n{_backbone(student)}"
        "model = torchvision.models.detection.MaskRCNN(\n"
        f"    backbone, num_classes=5, image_mean={list(mean)}, image_std={list(std)}\n)\n"
        f"missing, unexpected = model.load_state_dict(load_file({str(path)!r}), strict=False)\n"
        "assert not unexpected  # missing are the pyramid and the heads, which are new\n"
    )


def _backbone(student: Student) -> str:
    name, utils = untagged(student.spec.name), "torchvision.models.detection.backbone_utils"
    if name in CONVNEXTS:
        return (
            f"backbone = {utils}.BackboneWithFPN(\n"
            f"    torchvision.models.{name}().features, {_LAYERS}, {list(student.channels[-4:])}, 256\n)\n"
        )
    return (
        f"backbone = {utils}.resnet_fpn_backbone(\n"
        f"    backbone_name={name!r}, weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5\n)\n"
    )


FORMAT = ExportFormat(
    "torchvision-detection",
    "Mask R-CNN, Faster R-CNN and the like of torchvision load it as their backbone",
    check,
    reload,
    finetune,
    finetune,
    to_body,
)
