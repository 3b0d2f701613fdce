"""Exports that torchvision loads: the ResNets, whose keys timm shares with it, and the ConvNeXts, which are renamed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from dtpipe.distill.export.base import ExportFormat, Reloaded, check_counterpart, stage_outputs
from dtpipe.distill.student.student import Student, untagged

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
_IN_BLOCK = {"conv_dw": "block.0", "norm": "block.2", "mlp.fc1": "block.3", "mlp.fc2": "block.5"}


def check(student: Student) -> None:
    """Raises: ConfigError for a student that torchvision has no like of."""
    check_counterpart(student, (*RESNETS, *CONVNEXTS), "torchvision")


def to_torchvision(name: str, weight: Tensor, student: Student) -> tuple[str, Tensor]:
    """torchvision's name and shape of a weight of timm's full model."""
    if untagged(student.spec.name) not in CONVNEXTS:
        return name, weight
    if name.endswith(".gamma"):
        return _convnext_name(name), weight.view(-1, 1, 1)
    return _convnext_name(name), weight


def _convnext_name(name: str) -> str:
    """Stem and down-sampling lie at the even places of `features`, the stages' blocks at the odd ones."""
    first, second, *rest = name.split(".")
    if first == "stem":
        return ".".join(["features.0", second, *rest])
    if first == "head":  # the norm; there is no classifier
        return ".".join(["classifier.0", *rest])
    stage = 2 * int(second)
    if rest[0] == "downsample":
        return ".".join([f"features.{stage}", *rest[1:]])
    block, layer, parameter = rest[1], ".".join(rest[2:-1]), rest[-1]
    inside = f"{_IN_BLOCK[layer]}.{parameter}" if layer else "layer_scale"
    return f"features.{stage + 1}.{block}.{inside}"


def reload(path: Path, student: Student) -> Reloaded:
    """The stem's modules and the stages, without pooling and classifier."""
    name = untagged(student.spec.name)
    model: Any = getattr(torchvision.models, name)()
    if name in CONVNEXTS:
        model.classifier[2] = nn.Identity()
    else:
        model.fc = nn.Identity()
    model.load_state_dict(load_file(path))
    stages = model.eval().features if name in CONVNEXTS else list(model.eval().children())[:-2]
    return partial(stage_outputs, list(stages))


def snippet(path: Path, student: Student) -> str:
    """torchvision's constructor and a state dict without classifier."""
    name = untagged(student.spec.name)
    return (
        "import torch, torchvision\nfrom safetensors.torch import load_file\n"
        f"model = torchvision.models.{name}()\n{_head(name)} = torch.nn.Identity()\n"
        f"model.load_state_dict(load_file({str(path)!r}))\n"
    )


def finetune(path: Path, student: Student) -> str:
    """The same with a new classifier."""
    name = untagged(student.spec.name)
    return f"{snippet(path, student)}{_head(name)} = torch.nn.Linear({student.channels[-1]}, 5)\n"


def _head(name: str) -> str:
    return "model.classifier[2]" if name in CONVNEXTS else "model.fc"


FORMAT = ExportFormat(
    "torchvision",
    "torchvision's ResNets and ConvNeXts load it as a state dict",
    check,
    reload,
    snippet,
    finetune,
    to_torchvision,
)
