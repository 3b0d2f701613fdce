"""The teacher of a dataset, loaded again: for stochastic re-encoding, for `verify --level recompute`, for the report.

Always compared with the recipe, so that neither other weights nor other settings can pass for the dataset's teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.extract.teachers.base import Teacher, TeacherSpec
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.differences import differences, listed
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import LevelSpec, Plan, Recipe, TeacherRecipe

if TYPE_CHECKING:
    from torch import Tensor


def recorded_teacher(plan: Plan) -> dict[str, Any]:
    """The teacher's settings as the extraction recorded them; empty when the record is gone."""
    return _recorded(plan, "teacher")


def recorded_soft_labels(plan: Plan) -> dict[str, Any]:
    """Where an extraction of soft labels recorded its `interpreter` and `features`; empty when the record is gone."""
    return {name: place for name, place in _recorded(plan, "soft_labels").items() if isinstance(place, str)}


def _recorded(plan: Plan, section: str) -> dict[str, Any]:
    config = plan.provenance.get("config")
    settings = config.get(section) if isinstance(config, Mapping) else None
    return dict(settings) if isinstance(settings, Mapping) else {}


@dataclass(frozen=True)
class RecipeTeacher:
    """The teacher that made a dataset, or that encodes live as a recipe says, on a device."""

    recipe: Recipe
    teacher: Teacher
    device: str

    def encode(
        self, images: NDArray[np.uint8], keys: Sequence[str], batch_size: int | None = None
    ) -> dict[str, Tensor]:
        """Features of stored images, in batches of the recipe's size or another. Shapes: [N, H, W, 3] -> {level:
        (N, V, C, h, w)} on the device.
        """
        rows = recipe_rows(self.recipe, self.teacher.spec, keys, images)
        compute = self.recipe.compute
        return encode(self.teacher, rows, self.device, compute.in_batches(batch_size or compute.batch_size)).levels


def teacher_differences(recipe: Recipe, spec: TeacherSpec, dtype: str) -> list[str]:
    """In what a loaded teacher is not the one that made a dataset, a clause each; empty when features are the same."""
    made_by = recipe.teacher
    if spec.weights_blake3 != made_by.weights_blake3:
        loaded, stored = spec.weights_blake3[:16], made_by.weights_blake3[:16]
        return [f"weights have digest {loaded}.., the dataset was made with {stored}.."]
    teacher = TeacherRecipe(kind=spec.kind, weights_blake3=spec.weights_blake3, options=dict(spec.options))
    before = {**made_by.model_dump(mode="json"), "dtype": recipe.compute.dtype}
    now = {**teacher.model_dump(mode="json"), "dtype": dtype}
    clauses = [str(difference) for difference in differences(before, now, "teacher.")]
    clauses += [clause for level in recipe.levels if (clause := _level_difference(recipe, level, spec))]
    latest = max((view.timestep for view in recipe.views if view.timestep is not None), default=0)
    if spec.num_timesteps is not None and latest >= spec.num_timesteps:
        clauses.append(f"it has timesteps 0 to {spec.num_timesteps - 1}, the dataset was made at {latest}")
    return clauses


def _level_difference(recipe: Recipe, level: LevelSpec, spec: TeacherSpec) -> str | None:
    tap = next((tap for tap in spec.levels if tap.tap == level.tap), None)
    if tap is None:
        taps = ", ".join(tap.tap for tap in spec.levels)
        return f"level {level.name} of the dataset was read at tap {level.tap}, and the teacher is read at {taps}"
    expected = (tap.channels, recipe.transform.height // tap.stride, recipe.transform.width // tap.stride)
    stored = (level.channels, level.height, level.width)
    if expected == stored:
        return None
    return f"tap {level.tap} gives {_shape(expected)}, level {level.name} of the dataset is {_shape(stored)}"


def _shape(sides: tuple[int, int, int]) -> str:
    return "x".join(map(str, sides))


def open_teacher(
    plan: Plan, given: Mapping[str, Any], device: str, load: Callable[[TeacherConfig, str], Teacher] = load_teacher
) -> RecipeTeacher:
    """The teacher of a dataset: as its extraction recorded it, with `given` settings (`path`, `kind`) in their place.

    Raises: ConfigError when nothing says where it is; TeacherError when it is gone or another one.
    """
    config, device = _teacher_config(plan, given), pick_device(device)
    teacher = load(config, device)
    if clauses := teacher_differences(plan.recipe, teacher.spec, config.dtype):
        raise TeacherError(
            f"{config.path} is not the teacher that made the dataset ({listed(clauses)}); give that one with "
            "--teacher, and its settings"
        )
    return RecipeTeacher(plan.recipe, teacher, device)


def _teacher_config(plan: Plan, given: Mapping[str, Any]) -> TeacherConfig:
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
