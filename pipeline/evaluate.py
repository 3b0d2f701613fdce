"""`dtpipe eval`: labelled images and frozen networks into the functions of `distill.downstream`.

The table always holds raw pixels and the random initialisation of the same student; the teacher's own features when it can be had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from dtpipe.extract.config import NoiseConfig, TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.manifests.errors import ConfigError, DtpipeError, StoreError, TeacherError
from dtpipe.manifests.labels import Class, Mask
from dtpipe.manifests.schema import Plan, TransformRecipe, ViewSpec, height_width
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.labelled import LabelledReader, split_by_key
from dtpipe.pipeline.live.recorded import recorded_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.distill.downstream.extractors import FeatureExtractor, PerSeed
    from dtpipe.distill.downstream.labelled import LabelledSet
    from dtpipe.distill.downstream.result import ProbeResult

FEW_MASKS = (5, 20, 80)
FEW_PER_CLASS = (1, 5, 20)
DISTILLED, TEACHER = "distilled", "teacher"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """A result, and the file it was written to."""

    result: ProbeResult
    path: Path


def evaluate(config: EvalConfig, note: Note) -> Evaluation:
    """Score a student beside its rivals and write the result as JSON.

    Raises: ConfigError, InputError, TeacherError in a sentence before features are computed.
    """
    from dtpipe.distill.downstream.compare import run_probe
    from dtpipe.distill.student.load import load_student

    check_task(config)
    student = load_student(config.checkpoint)
    train, test = load_sets(config, student.spec.image_px, note)
    note(f"{len(train)} images to draw labels from, {len(test)} held out")
    extractors = _extractors(config, train, note)
    numbers, seeds = label_counts(config, train), range(config.seed, config.seed + config.seeds)
    result = run_probe(config.task, extractors, train, test, numbers, seeds, config.probe, note)
    result = replace(result, notes=(*result.notes, *overlap_notes(config, train, test)))
    return Evaluation(result, _write(config, result))


def check_task(config: EvalConfig) -> None:
    """Refuse a task that does not learn from what is given. Raises: ConfigError naming those that do."""
    from dtpipe.distill.downstream.registry import TASKS, find_task

    kind = Mask if config.masks else Class
    if find_task(config.task).target is not kind:
        fitting = ", ".join(name for name, task in TASKS.items() if task.target is kind)
        raise ConfigError(
            f"task {config.task} learns from classes; with --masks use {fitting}"
            if config.masks
            else f"task {config.task} learns from masks; give --masks, or with class folders use {fitting}"
        )


def load_sets(config: EvalConfig, student_px: tuple[int, int], note: Note) -> tuple[LabelledSet, LabelledSet]:
    """Images to draw labels from, and images held out. Raises: InputError, ConfigError."""
    height, width = height_width(config.px or student_px)
    recipe = TransformRecipe(resize=config.resize, height=height, width=width)
    reader = LabelledReader(config.images, config.masks, recipe, config.ignore_value)
    if config.test_images:
        if config.test_images == config.images:
            raise ConfigError(
                f"{config.images} is both --images and --test-images; leave out --test-images to split it"
            )
        held_out = LabelledReader(config.test_images, config.test_masks, recipe, config.ignore_value)
        train = reader.select(_limited(range(len(reader.items)), config.limit), note)
        test = held_out.select(
            _limited(range(len(held_out.items)), config.limit), note, train.classes, prefix="held out/"
        )
    else:
        keys, labels = [item.key for item in reader.items], [item.label for item in reader.items]
        parts = split_by_key(keys, labels, config.test_share, config.seed)
        train, test = (reader.select(_limited(part, config.limit), note) for part in parts)
    if config.masks and config.foreground:
        return train.foreground(), test.foreground()
    return train, test


def _limited(rows: Sequence[int], limit: int | None) -> Sequence[int]:
    """At most half of `limit` rows, spread evenly over the listing so that every class keeps its share."""
    if limit is None or len(rows) <= limit // 2:
        return rows
    return [rows[idx] for idx in np.linspace(0, len(rows) - 1, limit // 2).astype(int)]


def label_counts(config: EvalConfig, train: LabelledSet) -> list[int | None]:
    """Numbers of labelled images to score from; None is all of them."""
    if config.labelled is not None:
        return [None if num == "all" else int(num) for num in config.labelled]
    few = FEW_MASKS if train.kind is Mask else tuple(num * len(train.classes) for num in FEW_PER_CLASS)
    return [*(num for num in few if num < len(train)), None]


def overlap_notes(config: EvalConfig, train: LabelledSet, test: LabelledSet) -> list[str]:
    """What to say when held-out images are not new: labelled ones under other keys, or part of distillation."""
    same = len(set(train.digests) & set(test.digests))
    notes = [f"{same} of the held-out images are also among those that labels are drawn from"] if same else []
    return notes if config.test_images else notes + _seen_notes(config, test)


def _seen_notes(config: EvalConfig, test: LabelledSet) -> list[str]:
    """Images of distillation had no labels there, but were seen."""
    from dtpipe.manifests.read.dataset import FeatureDataset

    seen: set[str] = _live_keys(config.checkpoint)
    for url in _dataset_urls(config.checkpoint):
        with suppress(DtpipeError):  # a dataset that is gone cannot be compared
            seen.update(FeatureDataset.open(url, allow_incomplete=True).columns.keys)
    shared = len(seen & set(test.keys))
    return (
        [f"{shared} of the held-out images have keys of the distillation dataset: seen there, without labels"]
        if shared
        else []
    )


def _dataset_urls(checkpoint: str) -> list[str]:
    """What a run was trained on; empty for a checkpoint that is no run folder."""
    from dtpipe.distill.engine.run_folder import read_config

    try:
        return [str(url) for url in read_config(Path(checkpoint)).get("datasets") or ()]
    except DtpipeError:
        return []


def _live_settings(checkpoint: str) -> dict[str, Any]:
    """The `extract` section of a run that was trained without a dataset; empty for any other."""
    from dtpipe.distill.engine.run_folder import read_config

    try:
        return read_config(Path(checkpoint), "extract")
    except DtpipeError:
        return {}


def _live_px(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    px = settings.get("transform", {}).get("px")
    return height_width(px) if px else None


def _live_keys(checkpoint: str) -> set[str]:
    """Keys of the images of live training, as far as they are still there."""
    from dtpipe.extract.config import ExtractConfig
    from dtpipe.extract.recipe import list_source
    from dtpipe.extract.sources.registry import open_images

    settings = _live_settings(checkpoint)
    if not settings.get("images"):
        return set()
    with suppress(DtpipeError, ValueError):
        extract = ExtractConfig.model_validate({**settings, "out": checkpoint})
        return set(list_source(extract, open_images(extract.images, None, extract.source.kind)).keys)
    return set()


def _extractors(config: EvalConfig, train: LabelledSet, note: Note) -> list[FeatureExtractor | PerSeed]:
    from dtpipe.distill.downstream.extractors import random_initialisation, raw_pixels, student_extractor
    from dtpipe.distill.student.load import load_student

    device = pick_device(config.device)
    student = load_student(config.checkpoint)
    size = config.probe.batch_size
    extractors: list[FeatureExtractor | PerSeed] = [
        raw_pixels(),
        random_initialisation(student.spec, train, size, device),
    ]
    teacher = _teacher_extractor(config, device, note)
    if teacher is not None:
        extractors.append(teacher)
    extractors.append(student_extractor(student, device, DISTILLED))
    extractors += [student_extractor(load_student(other), device, other) for other in config.against]
    return extractors


def _teacher_extractor(config: EvalConfig, device: str, note: Note) -> FeatureExtractor | None:
    """The teacher asked for, else the one that made the dataset, if it is still there."""
    plan = _recorded_plan(config.checkpoint)
    live = _live_settings(config.checkpoint)
    settings: dict[str, Any] = recorded_teacher(plan) if plan else live.get("teacher", {})
    if config.teacher:
        settings = {"path": config.teacher}
    if "path" not in settings:
        note("the run does not say where its teacher is, so the teacher's own features are not scored; give --teacher")
        return None
    timestep = config.timestep if config.timestep is not None else _recorded_timestep(plan, live)
    try:
        px = (plan.recipe.transform.height, plan.recipe.transform.width) if plan else _live_px(live)
        if plan and plan.recipe.synthesized and not config.teacher:
            note("the teacher's own features are not scored: it makes its own images and cannot encode these")
            return None
        return teacher_extractor(TeacherConfig.model_validate(settings), timestep, config.seed, device, px)
    except DtpipeError as err:
        if config.teacher:
            raise
        note(f"the teacher's own features are not scored: {err}")
        return None


def _recorded_plan(checkpoint: str) -> Plan | None:
    from dtpipe.manifests.store.store import Store
    from dtpipe.manifests.write.plan import load_plan

    urls = _dataset_urls(checkpoint)
    try:
        return load_plan(Store(urls[0])) if urls else None
    except DtpipeError:
        return None


def _recorded_timestep(plan: Plan | None, live: Mapping[str, Any]) -> int | None:
    return plan.recipe.views[0].timestep if plan else NoiseConfig.model_validate(live.get("noise", {})).timesteps[0]


def teacher_extractor(
    config: TeacherConfig,
    timestep: int | None,
    seed: int,
    device: str,
    image_px: tuple[int, int] | None = None,
    name: str = TEACHER,
) -> FeatureExtractor:
    """A teacher's own features at one timestep as an extractor.

    The noise of an image follows from its content, since an extractor sees no keys. Images of another size than `image_px`
    (default: the teacher's own) are resized on the device. Raises: TeacherError for a teacher that makes its own images.
    """
    from dtpipe.distill.downstream.extractors import FeatureExtractor
    from dtpipe.distill.stream.batch import student_images
    from dtpipe.extract.encode import Sample, encode, stack_rows
    from dtpipe.extract.noise import row_noise
    from dtpipe.extract.teachers.base import Generator
    from dtpipe.extract.teachers.registry import load_teacher

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


def result_path(config: EvalConfig) -> Path:
    """Where the result goes. Raises: ConfigError for a checkpoint outside a run folder when no --out says."""
    if config.out:
        return Path(config.out)
    run = Path(config.checkpoint)
    run = run if run.is_dir() else run.parent
    return run / "eval" / f"{config.task}.json"


def _write(config: EvalConfig, result: ProbeResult) -> Path:
    path = result_path(config)
    document = {"config": config.model_dump(mode="json"), **result.to_json()}
    try:
        write_whole(path, json.dumps(document, indent=2, default=str) + "\n")
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; choose another --out") from err
    return path
