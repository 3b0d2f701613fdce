"""What a format of export declares: which students it has a place for, and how its library loads a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtpipe.distill.student.load import WEIGHTS
from dtpipe.distill.student.student import Student, normalisation, untagged
from dtpipe.manifests.errors import ConfigError

Reloaded = Callable[[Tensor], Sequence[Tensor]]
"""A model of the other library: images, normalised as timm does, to what its stages give, (B, C, h, w) each."""
CONFIG = "config.json"
"""Beside the weights in every export: which images the model takes."""


def as_timm(name: str, weight: Tensor, _student: Student) -> tuple[str, Tensor]:
    """A weight of timm's full model as it is."""
    return name, weight


def input_config(student: Student) -> dict[str, Any]:
    """Which images the model takes: values for config.json."""
    mean, std = normalisation(student.spec.name)
    return {"input_size": (3, *student.spec.image_px), "mean": mean, "std": std}


def input_documents(student: Student) -> dict[str, Mapping[str, Any] | str]:
    """What most formats have beside the weights."""
    return {CONFIG: input_config(student)}


def two_images(_path: Path, student: Student) -> list[tuple[int, int, int]]:
    """Two images of the student's size."""
    return [(2, *student.spec.image_px)]


@dataclass(frozen=True)
class ExportFormat:
    """A library that loads the written weights."""

    name: str
    summary: str
    check: Callable[[Student], None]
    """Raises: ConfigError when the library has no model for the student."""
    reload: Callable[[Path, Student], Reloaded]
    """A clean model of the library with the weights of a file; where the library cannot be installed, of another one
    with its names undone."""
    snippet: Callable[[Path, Student], str]
    """What a user types to load the file without dtpipe: Python gives `model`, without a classifier."""
    finetune: Callable[[Path, Student], str]
    """The same with a new classifier or head of five classes; empty where a format is not trained."""
    rename: Callable[[str, Tensor, Student], tuple[str, Tensor] | None] = as_timm
    """The library's name and shape of a weight of timm's full model; None for one that it has no place for."""
    file: str = WEIGHTS
    """Name of the file of weights."""
    write: Callable[[Path, Mapping[str, Tensor], Student], None] | None = None
    """Writes the renamed weights; by default as safetensors with the student's description in the metadata."""
    documents: Callable[[Student], Mapping[str, Mapping[str, Any] | str]] = input_documents
    """Files beside the weights, by name: values to be written as JSON, or text."""
    sizes: Callable[[Path, Student], Sequence[tuple[int, int, int]]] = two_images
    """Batch sizes, heights and widths of images that the file is compared with the student on."""
    tolerance: float = 1e-5
    """Largest difference, as a share of a level's largest value: the same operations in float32, by other kernels."""


def check_counterpart(student: Student, names: Sequence[str], library: str) -> str:
    """The student's name without a tag, where it is one of `names`. Raises: ConfigError listing these."""
    name = untagged(student.spec.name)
    if name not in names:
        raise ConfigError(
            f"student {student.spec.name} has no {library} counterpart with the same layers; those with one are "
            f"{', '.join(names)}; export it in timm's layout"
        )
    return name


def stage_outputs(modules: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """What each module gives when they run one after the other."""
    outputs = [images]
    for module in modules:
        outputs.append(module(outputs[-1].clone()))  # a ReLU may work in place
    return outputs[1:]
