"""Exports that mmdet, mmseg and mmpretrain load as a pre-trained backbone: names under `state_dict`.

A ResNet has torchvision's names, a ConvNeXt those of mmpretrain below `backbone.`, as its released files do.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor

from dtpipe.distill.export.base import ExportFormat, Reloaded, check_counterpart
from dtpipe.distill.export.convnext import to_official
from dtpipe.distill.export.timm import full_model
from dtpipe.distill.export.torchvision import CONVNEXTS
from dtpipe.distill.student.student import Student, untagged

_RESNETS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
_NAMES = (*_RESNETS, *CONVNEXTS, "convnext_xlarge")
_PREFIX = "backbone."


def check(student: Student) -> None:
    """Raises: ConfigError for a student that OpenMMLab has no like of."""
    check_counterpart(student, _NAMES, "OpenMMLab")


def to_openmmlab(name: str, weight: Tensor, student: Student) -> tuple[str, Tensor]:
    """OpenMMLab's name of a weight.

    Source: mmpretrain, tools/model_converters/convnext_to_mmpretrain.py.
    """
    if untagged(student.spec.name) in _RESNETS:
        return name, weight
    official, weight = to_official(name, weight, student)
    theirs = official.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
    theirs = f"norm3.{theirs.removeprefix('norm.')}" if theirs.startswith("norm.") else theirs
    return f"{_PREFIX}{theirs}", weight


def write(path: Path, weights: Mapping[str, Tensor], _student: Student) -> None:
    """As mmengine saves checkpoints."""
    torch.save({"meta": {}, "state_dict": dict(weights)}, path)


def reload(path: Path, student: Student) -> Reloaded:
    """timm's model with the weights under their first names, as mmdet and mmseg need packages compiled for one torch.

    mmpretrain 1.2.0 loads the printed backbones, tried by hand: docs/exports.md.
    """
    model: Any = full_model(student)
    weights = torch.load(path, weights_only=True)["state_dict"]
    if untagged(student.spec.name) not in _RESNETS:
        to_timm: Any = checkpoint_filter_fn
        weights = to_timm({_official(name): weight for name, weight in weights.items()}, model)
    model.load_state_dict(weights)
    return partial(model.forward_intermediates, intermediates_only=True)


def _official(name: str) -> str:
    """The name in the ConvNeXt paper's code."""
    name = name.removeprefix(_PREFIX).replace("depthwise_conv", "dwconv").replace("pointwise_conv", "pwconv")
    return f"norm.{name.removeprefix('norm3.')}" if name.startswith("norm3.") else name


def finetune(path: Path, student: Student) -> str:
    """The backbone of a config; the number of classes stands in its heads."""
    name = untagged(student.spec.name)
    if name in _RESNETS:
        return (
            f"backbone = dict(\n    type='ResNet', depth={_RESNETS[name]}, style='pytorch', frozen_stages=-1,\n"
            f"    init_cfg=dict(type='Pretrained', checkpoint={str(path)!r}),\n)\n"
        )
    return (
        "custom_imports = dict(imports='mmpretrain.models', allow_failed_imports=False)\n"
        f"backbone = dict(\n    type='mmpretrain.ConvNeXt', arch={name.removeprefix('convnext_')!r}, "
        "out_indices=(0, 1, 2, 3), gap_before_final_norm=False,\n"
        f"    init_cfg=dict(type='Pretrained', checkpoint={str(path)!r}, prefix={_PREFIX!r}),\n)\n"
    )


FORMAT = ExportFormat(
    "openmmlab",
    "mmdet, mmseg and mmpretrain load it into their ResNets and ConvNeXts",
    check,
    reload,
    finetune,
    finetune,
    to_openmmlab,
    "model.pth",
    write,
)
