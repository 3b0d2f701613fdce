"""The arms of a table: raw pixels, the untrained student, the teacher's own features, the student, other students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from dtpipe.distill.downstream.extractors import (
    FeatureExtractor,
    PerSeed,
    patches_and_position,
    position_prior,
    random_initialisation,
    raw_pixels,
    student_extractor,
)
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.stream.batch import student_images
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.encode import Sample, encode, stack_rows
from dtpipe.extract.noise import row_noise
from dtpipe.extract.teachers.base import Generator
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import DtpipeError, TeacherError
from dtpipe.manifests.labels import Mask
from dtpipe.manifests.schema import TransformRecipe, ViewSpec
from dtpipe.pipeline.arms import Arm, Comparison
from dtpipe.pipeline.cli.console import Note, say_nothing
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.sets import open_sets
from dtpipe.pipeline.trained_on import RunTeacher

if TYPE_CHECKING:
    from torch import Tensor

TEACHER = "teacher"


def extractors_of(
    config: EvalConfig,
    comparison: Comparison,
    teacher: RunTeacher,
    train: LabelledSet,
    at: TransformRecipe,
    note: Note,
) -> list[FeatureExtractor | PerSeed]:
    """All arms, in the order of the table; the teacher where it can be had, else `note` says why not.

    `at` is how images come to the size of the task. Of masks, what the place of a cell tells stands beside the pixels.

    Raises: TeacherError when the teacher that was asked for cannot be used; InputError for a checkpoint that cannot.
    """
    device = pick_device(config.device)
    arms: list[FeatureExtractor | PerSeed] = [
        raw_pixels(),
        *([position_prior(), patches_and_position()] if train.kind is Mask else []),
        random_initialisation(comparison.spec, train, config.probe.batch_size, device),
    ]
    own = _own_features(config, teacher, device, at, note)
    if own is not None:
        arms.append(own)
    return arms + [arm_extractor(arm, comparison.seeds, device) for arm in comparison.arms]


def arm_extractor(arm: Arm, seeds: range, device: str) -> FeatureExtractor | PerSeed:
    """The frozen students of an arm: one for all seeds, or one for each."""
    if arm.num == 1:
        return student_extractor(arm.student_for(seeds[0]), device, arm.name)
    return PerSeed(arm.name, lambda seed: student_extractor(arm.student_for(seed), device, arm.name))


ReadImages = Callable[[Sequence[str]], "Tensor"]


class OwnImages:
    """Images of a table by their keys at another size than the task's; opened when the first is read."""

    def __init__(self, config: EvalConfig, recipe: TransformRecipe) -> None:
        self.config, self.recipe = config, recipe

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """Shapes: -> (B, H, W, 3) uint8."""
        import torch

        places = [self._places[key] for key in keys]
        return torch.from_numpy(np.stack([labelled.image(row) for labelled, row in places]))

    @cached_property
    def _places(self) -> dict[str, tuple[LabelledSet, int]]:
        sets = open_sets(self.config, self.recipe, say_nothing)  # what is wrong with them was said
        return {key: (labelled, row) for labelled in sets for row, key in enumerate(labelled.keys)}


def reader_at(config: EvalConfig, size: tuple[int, int], at: TransformRecipe, note: Note) -> ReadImages | None:
    """What reads a teacher's images at its own size; None where it is the task's, or they would show another part."""
    if size == (at.height, at.width):
        return None
    same_part = at.resize == "stretch" or (at.resize == "center_crop" and size[0] * at.width == size[1] * at.height)
    if not same_part:
        note(
            f"the teacher sees the task's images, {at.height}x{at.width} px, brought to its {size[0]}x{size[1]}: read"
            f" at that size with resize {at.resize} they would show another part"
        )
        return None
    return OwnImages(config, at.model_copy(update={"height": size[0], "width": size[1]}))


def _own_features(
    config: EvalConfig, teacher: RunTeacher, device: str, at: TransformRecipe, note: Note
) -> FeatureExtractor | None:
    """The teacher asked for, which sees images of its own size, else the run's, if it is still there."""
    settings = {"path": config.teacher} if config.teacher else teacher.settings
    if "path" not in settings:
        note("the run does not say where its teacher is, so the teacher's own features are not scored; give --teacher")
        return None
    if teacher.synthesizes and not config.teacher:
        note("the teacher's own features are not scored: it makes its own images and cannot encode these")
        return None
    timestep = teacher.timestep if config.timestep is None else config.timestep
    try:
        return teacher_extractor(
            TeacherConfig.model_validate(settings),
            timestep,
            config.seed,
            device,
            None if config.teacher else teacher.image_px,
            read_at=lambda size: reader_at(config, size, at, note),
        )
    except DtpipeError as err:
        if config.teacher:
            raise
        note(f"the teacher's own features are not scored: {err}")
        return None


def teacher_extractor(
    config: TeacherConfig,
    timestep: int | None,
    seed: int,
    device: str,
    image_px: tuple[int, int] | None = None,
    name: str = TEACHER,
    read_at: Callable[[tuple[int, int]], ReadImages | None] = lambda _size: None,
) -> FeatureExtractor:
    """A teacher's own features at one timestep as an extractor.

    The noise of an image follows from its content, since an extractor sees no keys. Images are read at `image_px`
    (default: the teacher's own) by what `read_at` gives for it, else those of the task are resized on the device.

    Raises: TeacherError for a teacher that makes its own images.
    """
    teacher = load_teacher(config, device)
    spec = teacher.spec
    if isinstance(teacher, Generator):
        raise TeacherError(f"{config.path}: a {spec.kind} teacher makes its own images and cannot encode these")
    size = image_px or spec.image_px
    views = [ViewSpec(draw=0, timestep=timestep if spec.num_timesteps is not None else None)]

    def features_of(images: Tensor) -> dict[str, Tensor]:
        keys = [blake3(image.numpy().tobytes()).hexdigest() for image in images.contiguous()]
        samples = [Sample(row_noise(seed, key, views, spec.noise_shapes, size)) for key in keys]
        rows = replace(stack_rows(samples, views, levels=()), images=student_images(images.to(device), size))
        return {level: values[:, 0] for level, values in encode(teacher, rows, device).levels.items()}

    return FeatureExtractor(name, features_of, read=read_at(size))
