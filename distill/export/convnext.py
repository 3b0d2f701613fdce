"""Exports that the code of the ConvNeXt paper loads: its names under `model`.

Its segmentation and detection, SparK and timm's own loader read them too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import load_checkpoint
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor

from dtpipe.distill.export.base import ExportFormat, Reloaded, check_counterpart
from dtpipe.distill.export.timm import full_model
from dtpipe.distill.student.student import Student, untagged

_DEPTHS = {
    "convnext_tiny": [3, 3, 9, 3],
    "convnext_small": [3, 3, 27, 3],
    "convnext_base": [3, 3, 27, 3],
    "convnext_large": [3, 3, 27, 3],
    "convnext_xlarge": [3, 3, 27, 3],
}


def check(student: Student) -> None:
    """Raises: ConfigError for a student that is none of the paper's ConvNeXts."""
    check_counterpart(student, tuple(_DEPTHS), "ConvNeXt")


def to_official(name: str, weight: Tensor, _student: Student) -> tuple[str, Tensor]:
    """The name of a weight in facebookresearch/ConvNeXt."""
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
    name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
    return name.replace("head.norm.", "norm."), weight


def write(path: Path, weights: Mapping[str, Tensor], _student: Student) -> None:
    """As the released files are."""
    torch.save({"model": dict(weights)}, path)


def reload(path: Path, student: Student) -> Reloaded:
    """timm's model by timm's own conversion of the released files."""
    model: Any = full_model(student)
    load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn)
    return partial(model.forward_intermediates, intermediates_only=True)


def finetune(path: Path, student: Student) -> str:
    """A model of five classes in the paper's own code."""
    depths = _DEPTHS[untagged(student.spec.name)]
    return (
        "import torch\nfrom models.convnext import ConvNeXt  # of github.com/facebookresearch/ConvNeXt\n"
        f"model = ConvNeXt(depths={depths}, dims={list(student.channels[-4:])}, num_classes=5)\n"
        f"weights = torch.load({str(path)!r}, weights_only=True)['model']\n"
        "missing, unexpected = model.load_state_dict(weights, strict=False)\n"
        "assert not unexpected  # missing is the head, which is new\n"
    )


FORMAT = ExportFormat(
    "convnext",
    "the ConvNeXt paper's code, SparK and timm load it: official names under 'model'",
    check,
    reload,
    finetune,
    finetune,
    to_official,
    "model.pth",
    write,
)
