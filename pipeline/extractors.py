"""The arms of a table: raw pixels, the untrained student, the teacher's own features, the student, other students."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blake3 import blake3

from dtpipe.distill.downstream.extractors import (
    FeatureExtractor,
    PerSeed,
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
from dtpipe.manifests.schema import ViewSpec
from dtpipe.pipeline.arms import Arm, Comparison
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.trained_on import RunTeacher

if TYPE_CHECKING:
    from torch import Tensor

TEACHER = "teacher"


def extractors_of(
    config: EvalConfig, comparison: Comparison, teacher: RunTeacher, train: LabelledSet, note: Note
) -> list[FeatureExtractor | PerSeed]:
    """All arms, in the order of the table; the teacher where it can be had, else `note` says why not.

    Raises: TeacherError when the teacher that was asked for cannot be used; InputError for a checkpoint that cannot.
    """
    device = pick_device(config.device)
    arms: list[FeatureExtractor | PerSeed] = [
        raw_pixels(),
        random_initialisation(comparison.spec, train, config.probe.batch_size, device),
    ]
    own = _own_features(config, teacher, device, note)
    if own is not None:
        arms.append(own)
    return arms + [arm_extractor(arm, comparison.seeds, device) for arm in comparison.arms]


def arm_extractor(arm: Arm, seeds: range, device: str) -> FeatureExtractor | PerSeed:
    """The frozen students of an arm: one for all seeds, or one for each."""
    if arm.num == 1:
        return student_extractor(arm.student_for(seeds[0]), device, arm.name)
    return PerSeed(arm.name, lambda seed: student_extractor(arm.student_for(seed), device, arm.name))


def _own_features(config: EvalConfig, teacher: RunTeacher, device: str, note: Note) -> FeatureExtractor | None:
    """The teacher asked for, else the run's, if it is still there."""
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
            TeacherConfig.model_validate(settings), timestep, config.seed, device, teacher.image_px
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
) -> FeatureExtractor:
    """A teacher's own features at one timestep as an extractor.

    The noise of an image follows from its content, since an extractor sees no keys. Images of another size than
    `image_px` (default: the teacher's own) are resized on the device.

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

    return FeatureExtractor(name, features_of)
