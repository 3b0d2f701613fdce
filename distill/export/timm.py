"""Exports that timm loads, by `checkpoint_path` or from the folder as `local-dir:`; transformers reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from dtpipe.distill.export.base import CONFIG, ExportFormat, Reloaded, input_config
from dtpipe.distill.student.student import Student, model_options, untagged
from dtpipe.manifests.errors import ExportError


def check(_student: Student) -> None:
    """Every student is a timm model."""


def full_model(student: Student) -> nn.Module:
    """timm's model of a student without classifier, with random weights."""
    model: nn.Module = timm.create_model(student.spec.name, num_classes=0, **model_options(student.spec))
    return model.eval()


def reload(path: Path, student: Student) -> Reloaded:
    """Raises: ExportError for a model of timm that does not show its levels."""
    name = student.spec.name
    model: Any = timm.create_model(name, num_classes=0, checkpoint_path=str(path), **model_options(student.spec))
    if not hasattr(model, "forward_intermediates"):
        raise ExportError(f"{name}: timm's model does not show its levels, so the export cannot be checked")
    return partial(model.eval().forward_intermediates, intermediates_only=True)


def snippet(path: Path, student: Student) -> str:
    """One call of timm."""
    options = "".join(f", {key}={value!r}" for key, value in model_options(student.spec).items())
    arguments = f"{student.spec.name!r}, num_classes=0, checkpoint_path={str(path)!r}{options}"
    return f"import timm\nmodel = timm.create_model({arguments})\n"


def finetune(path: Path, _student: Student) -> str:
    """timm's own way with a folder; `in_chans=1` and the like work too."""
    name = f"local-dir:{path.parent}"
    return f"import timm\nmodel = timm.create_model({name!r}, pretrained=True, num_classes=5)\n"


def hub_config(student: Student) -> dict[str, Mapping[str, Any] | str]:
    """config.json as `local-dir:`, timm's hub and transformers read it.

    `classifier` and `first_conv` name the layers that they leave out or convert for another number of classes or of
    channels.
    """
    full: Any = full_model(student)
    ours = {**input_config(student), "num_classes": 0, "pool_size": None}
    kept = ("fixed_input_size", "interpolation", "crop_pct", "crop_mode", "first_conv", "classifier")
    config = {
        "architecture": untagged(student.spec.name),
        "num_classes": 0,
        "num_features": full.num_features,
        "model_args": model_options(student.spec),
        "pretrained_cfg": {name: full.pretrained_cfg[name] for name in kept if name in full.pretrained_cfg} | ours,
    }
    return {CONFIG: config}


FORMAT = ExportFormat(
    "timm", "timm and transformers load it, any student", check, reload, snippet, finetune, documents=hub_config
)
