"""Exports that torchvision loads: the ResNets, whose blocks and keys timm shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from dtpipe.distill.export.base import ExportFormat, Reloaded
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError

_NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def check(student: Student) -> None:
    """Raises: ConfigError for any other student than these ResNets."""
    if student.spec.name not in _NAMES:
        raise ConfigError(
            f"student {student.spec.name} has no torchvision counterpart with the same layers; those with one are "
            f"{', '.join(_NAMES)}; export it in timm's layout"
        )


def reload(path: Path, student: Student) -> Reloaded:
    """The stem's modules and the stages, without pooling and classifier."""
    resnet = getattr(torchvision.models, student.spec.name)()
    resnet.fc = nn.Identity()
    resnet.load_state_dict(load_file(path))
    return partial(_outputs, list(resnet.eval().children())[:-2])


def _outputs(modules: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """What each module gives when they run one after the other."""
    outputs = [images]
    for module in modules:
        outputs.append(module(outputs[-1].clone()))  # a ReLU may work in place
    return outputs[1:]


def snippet(path: Path, student: Student) -> str:
    """torchvision's constructor and a state dict without classifier."""
    return (
        "import torch, torchvision\nfrom safetensors.torch import load_file\n"
        f"model = torchvision.models.{student.spec.name}()\nmodel.fc = torch.nn.Identity()\n"
        f"model.load_state_dict(load_file({str(path)!r}))\n"
    )


FORMAT = ExportFormat("torchvision", "torchvision's ResNets load it as a state dict", check, reload, snippet)
