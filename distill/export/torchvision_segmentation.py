"""Exports that torchvision's DeepLab and FCN load: the backbone below `backbone.`, dilated there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import load_file
from torch import Tensor

from dtpipe.distill.export.base import ExportFormat, Reloaded, check_counterpart, stage_outputs
from dtpipe.distill.export.torchvision_detection import PREFIX
from dtpipe.distill.student.student import Student, untagged

_NAMES = ("resnet50", "resnet101")  # those that torchvision makes a DeepLab of
_DILATED = {"layer3": 2, "layer4": 4}  # how much finer than the student's level these are


def check(student: Student) -> None:
    """Raises: ConfigError for a student that torchvision has no DeepLab of."""
    check_counterpart(student, _NAMES, "DeepLab")


def to_backbone(name: str, weight: Tensor, _student: Student) -> tuple[str, Tensor]:
    """The name in a segmentation model."""
    return f"{PREFIX}{name}", weight


def reload(path: Path, student: Student) -> Reloaded:
    """A clean DeepLab's backbone, at the positions that the student has too.

    Strides are replaced by dilation there, so that every second (of layer3) or fourth (of layer4) row and column is
    what the strided network computes.
    """
    model: Any = getattr(torchvision.models.segmentation, f"deeplabv3_{untagged(student.spec.name)}")(
        weights=None, weights_backbone=None
    )
    weights = {key.removeprefix(PREFIX): weight for key, weight in load_file(path).items()}
    model.backbone.load_state_dict(weights)
    names, modules = zip(*model.eval().backbone.named_children(), strict=True)

    def levels(images: Tensor) -> list[Tensor]:
        steps = [_DILATED.get(name, 1) for name in names]
        outputs = zip(stage_outputs(modules, images), steps, strict=True)
        return [output[..., ::step, ::step] for output, step in outputs]

    return levels


def finetune(path: Path, student: Student) -> str:
    """DeepLab of five classes; `fcn_resnet50` takes the file alike."""
    return (
        "import torchvision\nfrom safetensors.torch import load_file\n"
        f"model = torchvision.models.segmentation.deeplabv3_{untagged(student.spec.name)}(\n"
        "    weights=None, weights_backbone=None, num_classes=5\n)\n"
        f"missing, unexpected = model.load_state_dict(load_file({str(path)!r}), strict=False)\n"
        "assert not unexpected  # missing is the head, which is new\n"
    )


FORMAT = ExportFormat(
    "torchvision-segmentation",
    "DeepLab and FCN of torchvision load it as their backbone",
    check,
    reload,
    finetune,
    finetune,
    to_backbone,
)
