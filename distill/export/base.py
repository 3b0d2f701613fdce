"""What a format of export declares: which students it has a place for, and how its library loads a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dtpipe.distill.student.student import Student

Reloaded = Callable[[Tensor], Sequence[Tensor]]
"""A model of the other library: images, normalised as timm does, to what its stages give, (B, C, h, w) each."""


def as_timm(name: str, weight: Tensor, _student: Student) -> tuple[str, Tensor]:
    """A weight of timm's full model as it is."""
    return name, weight


@dataclass(frozen=True)
class ExportFormat:
    """A library that loads the written weights."""

    name: str
    summary: str
    check: Callable[[Student], None]
    """Raises: ConfigError when the library has no model for the student."""
    reload: Callable[[Path, Student], Reloaded]
    """A clean model of the library with the weights of a file."""
    snippet: Callable[[Path, Student], str]
    """Python that loads the file without dtpipe, as `model` without a classifier."""
    finetune: Callable[[Path, Student], str]
    """The same with a new classifier of five classes."""
    rename: Callable[[str, Tensor, Student], tuple[str, Tensor]] = as_timm
    """The library's name and shape of a weight of timm's full model."""
