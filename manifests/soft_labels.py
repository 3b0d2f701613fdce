"""How a dataset of soft labels says what it holds: logits of an interpreter's classes, one level of role soft_labels.

Its teacher is the interpreter: kind `interpreter`, the digest of the head, and the options named here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtpipe.manifests.schema import LevelSpec, Recipe, TeacherRecipe

INTERPRETER = "interpreter"
"""The teacher kind of datasets of soft labels."""


@dataclass(frozen=True)
class SoftLabels:
    """What a recipe says of its soft labels."""

    level: LevelSpec
    """Its channels are the classes; one cell where a class is of the whole image."""
    classes: tuple[str, ...]
    head_blake3: str
    """Digest of the interpreter."""
    features: Mapping[str, Any]
    """What it read: `dataset`, the digest of a feature dataset, or `teacher`, the recipe of one that ran live."""


def soft_label_name(stride: int) -> str:
    """Name of the level of logits at a stride: `l2.labels` at stride 4."""
    return f"l{stride.bit_length() - 1}.labels"


def interpreter_recipe(
    head_blake3: str, classes: Sequence[str], features: Mapping[str, Any], **options: Any
) -> TeacherRecipe:
    """The teacher of a dataset of soft labels."""
    named = {"classes": list(classes), "features": dict(features), **options}
    return TeacherRecipe(kind=INTERPRETER, weights_blake3=head_blake3, options=named)


def soft_labels_of(recipe: Recipe) -> SoftLabels | None:
    """The soft labels of a dataset; None where it holds none."""
    level = next((level for level in recipe.levels if level.role == "soft_labels"), None)
    if level is None:
        return None
    teacher = recipe.teacher
    return SoftLabels(level, tuple(teacher.options["classes"]), teacher.weights_blake3, teacher.options["features"])
