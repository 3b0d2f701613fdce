"""The teacher of a dataset, loaded again: for stochastic re-encoding, for `verify --level recompute`, for the report.

Always compared with the recipe, so that neither other weights nor other settings can pass for the dataset's teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.manifests.differences import differences, listed
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import LevelSpec, Plan, Recipe, TeacherRecipe, ViewSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dtpipe.extract.teachers.base import Teacher, TeacherSpec


def recorded_teacher(plan: Plan) -> dict[str, Any]:
    """The teacher's settings as the extraction recorded them; empty when the record is gone."""
    config = plan.provenance.get("config") or {}
    teacher = config.get("teacher") if isinstance(config, Mapping) else None
    return dict(teacher) if isinstance(teacher, Mapping) else {}


class RecipeTeacher:
    """The teacher that made a dataset, on a device."""

    def __init__(
        self, recipe: Recipe, config: TeacherConfig, device: str = "auto", teacher: Teacher | None = None
    ) -> None:
        """`teacher`: what `config` names, where it is loaded already. Raises: TeacherError saying what differs from the recipe."""
        from dtpipe.extract.teachers.registry import load_teacher

        self.recipe = recipe
        self.device = pick_device(device)
        self.teacher: Teacher = teacher if teacher is not None else load_teacher(config, self.device)
        if found := teacher_differences(recipe, self.teacher.spec, config.dtype):
            raise TeacherError(
                f"{config.path} is not the teacher that made the dataset ({listed(found)}); give that one with --teacher, "
                "and its settings"
            )

    def encode(
        self, images: np.ndarray, keys: Sequence[str], views: Sequence[ViewSpec] | None = None
    ) -> dict[str, Tensor]:
        """Features of stored images. Shapes: [N, H, W, 3] uint8 -> {level: (N, V, C, h, w)} on the device."""
        from dtpipe.extract.encode import encode, recipe_rows

        rows = recipe_rows(self.recipe, self.teacher.spec, keys, images, views)
        return encode(self.teacher, rows, self.device, self.recipe.compute).levels


def teacher_differences(recipe: Recipe, spec: TeacherSpec, dtype: str) -> list[str]:
    """In what a loaded teacher is not the one that made a dataset, a clause each; empty when it gives the same features."""
    made = recipe.teacher
    if spec.weights_blake3 != made.weights_blake3:
        return [
            f"weights have digest {spec.weights_blake3[:16]}.., the dataset was made with {made.weights_blake3[:16]}.."
        ]
    found = TeacherRecipe(kind=spec.kind, weights_blake3=spec.weights_blake3, options=dict(spec.options))
    stored, loaded = (
        {**each.model_dump(mode="json"), "dtype": at} for each, at in ((made, recipe.compute.dtype), (found, dtype))
    )
    clauses = [str(difference) for difference in differences(stored, loaded, "teacher.")]
    clauses += [difference for level in recipe.levels if (difference := _level_difference(recipe, level, spec))]
    latest = max((view.timestep for view in recipe.views if view.timestep is not None), default=0)
    if spec.num_timesteps is not None and latest >= spec.num_timesteps:
        clauses.append(f"it has timesteps 0 to {spec.num_timesteps - 1}, the dataset was made at {latest}")
    return clauses


def _level_difference(recipe: Recipe, level: LevelSpec, spec: TeacherSpec) -> str | None:
    tap = next((each for each in spec.levels if each.tap == level.tap), None)
    if tap is None:
        taps = ", ".join(each.tap for each in spec.levels)
        return f"level {level.name} of the dataset was read at tap {level.tap}, and the teacher is read at {taps}"
    sides = (recipe.transform.height // tap.stride, recipe.transform.width // tap.stride)
    if (tap.channels, *sides) != (level.channels, level.height, level.width):
        stored = f"{level.channels}x{level.height}x{level.width}"
        return (
            f"tap {level.tap} gives {tap.channels}x{sides[0]}x{sides[1]}, level {level.name} of the dataset is {stored}"
        )
    return None


def open_teacher(plan: Plan, given: Mapping[str, Any], device: str) -> RecipeTeacher:
    """The teacher of a dataset: as recorded by its extraction, with `given` settings (`path`, `kind` ..) in their place.

    Raises: ConfigError when nothing says where it is; TeacherError when it is gone or another one.
    """
    return RecipeTeacher(plan.recipe, teacher_config(plan, given), device)


def teacher_config(plan: Plan, given: Mapping[str, Any]) -> TeacherConfig:
    """The settings that `open_teacher` loads. Raises: ConfigError when nothing says where the teacher is."""
    settings = {**recorded_teacher(plan), **given}
    if "path" not in settings:
        raise ConfigError("the dataset does not say where its teacher is; give it with --teacher")
    try:
        return TeacherConfig.model_validate(settings)
    except ValidationError as err:
        raise ConfigError(
            f"extract.teacher: {err.errors()[0]['msg']} (found {err.errors()[0]['input']!r}); correct the setting"
        ) from err
