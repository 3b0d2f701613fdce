"""How a dataset of soft labels says what it holds: logits of an interpreter's classes, one level of role soft_labels.

Its teacher is the interpreter: kind `interpreter`, the digest of the head, and the options named here. Its views are
those of the features that were read; where several are read together, one for each draw and flip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec, Recipe, TeacherRecipe, ViewSpec
from dtpipe.manifests.words import count_of

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
    """What it read: `dataset`, the digest of a feature dataset; or the `teacher`, `levels` and `views` of features that
    were made live."""


@dataclass(frozen=True)
class LabelView:
    """One view of soft labels."""

    view: ViewSpec
    reads: tuple[int, ...]
    """The views of the features that are read for it, together."""


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


def recipe_of_live(features: Recipe) -> dict[str, Any]:
    """What a recipe of soft labels says of features that are stored nowhere."""
    return features.model_dump(mode="json", include={"teacher", "levels", "views"})


def live_features_of(recipe: Recipe) -> Recipe | None:
    """The recipe of features that were made live for soft labels; None where they were read from a dataset."""
    labels = soft_labels_of(recipe)
    if labels is None or "teacher" not in labels.features:
        return None
    return Recipe.model_validate({**recipe.model_dump(mode="json"), **labels.features})


def label_views(
    views: Sequence[ViewSpec], num_together: int, timesteps: Sequence[int | None] | None = None
) -> tuple[LabelView, ...]:
    """The views of soft labels of features with `views`, of which an interpreter reads so many together.

    One by one, each keeps its draw, timestep and flip. Together are those of one draw and flip, in the order of the
    `timesteps` that the interpreter was trained on, else in their own; their timestep is none.
    Raises: ConfigError when a draw and flip have more or fewer of them, or a single one is of another timestep.
    """
    if num_together == 1:
        _refuse_other_timesteps(views, timesteps)
        return tuple(LabelView(view, (idx,)) for idx, view in enumerate(views))
    groups: dict[tuple[int, bool], list[int]] = {}
    for idx, view in enumerate(views):
        groups.setdefault((view.draw, view.flip), []).append(idx)
    together = []
    for (draw, flip), idxs in groups.items():
        own = [views[idx].timestep for idx in idxs]
        read = own if timesteps is None else list(timesteps)
        reads = tuple(idxs[own.index(timestep)] for timestep in read if timestep in own)
        if len(reads) != num_together:
            trained = "" if timesteps is None else f" of timesteps {', '.join(map(str, timesteps))}"
            raise ConfigError(
                f"the interpreter reads {count_of(num_together, 'view')} together{trained}, and draw {draw}"
                f"{', flipped,' if flip else ''} has timesteps {', '.join(map(str, own))}; extract the features with "
                "those that it was trained on"
            )
        together.append(LabelView(ViewSpec(draw=draw, flip=flip), reads))
    return tuple(together)


def _refuse_other_timesteps(views: Sequence[ViewSpec], timesteps: Sequence[int | None] | None) -> None:
    others = dict.fromkeys(view.timestep for view in views if timesteps is not None and view.timestep not in timesteps)
    if others:
        raise ConfigError(
            f"the interpreter was trained on features of timestep {_names(timesteps or ())}, and there are views of "
            f"{_names(tuple(others))}, of which it learned nothing; give it features of its own timesteps "
            "alone, or train another on these (`dtpipe interpret`)"
        )


def _names(timesteps: Sequence[int | None]) -> str:
    return ", ".join("none" if timestep is None else str(timestep) for timestep in timesteps)


def label_view_of(view: ViewSpec, labels: Sequence[ViewSpec]) -> int | None:
    """Which view of soft labels goes with a view of features; None where nothing says which.

    The same one; else the only one of the same draw and flip; else the only one of the same flip, since labels are of
    the image, whatever noise they were read in.
    """
    flipped = [idx for idx, label in enumerate(labels) if label.flip == view.flip]
    of_draw = [idx for idx in flipped if labels[idx].draw == view.draw]
    same = [idx for idx in of_draw if labels[idx].timestep == view.timestep]
    return next((chosen[0] for chosen in (same, of_draw, flipped) if len(chosen) == 1), None)
