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
from dtpipe.manifests.errors import ConfigError, DtpipeError, StoreError, TeacherError
from dtpipe.manifests.schema import Plan, TransformRecipe, ViewSpec, height_width
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.labelled import LabelledReader, class_names_of, split_by_key
from dtpipe.pipeline.live.recorded import pick_device, recorded_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.distill.downstream.base import FeatureExtractor, LabelledSet, PerSeed
    from dtpipe.distill.downstream.result import ProbeResult

TASKS = {  # what a person asks for; `distill.downstream.compare.TASKS` are the functions behind them
    "probe": "linear read-out: of classes on pooled features, or with --masks of each cell's class",
    "knn": "weighted nearest neighbours by cosine of pooled features",
}
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
    from dtpipe.distill.downstream import compare
    from dtpipe.distill.student.load import load_student

    task = _task(config)
    student = load_student(config.checkpoint)
    train, test = load_sets(config, student.spec.image_px, note)
    note(f"{len(train)} images to draw labels from, {len(test)} held out")
    extractors = _extractors(config, train, note)
    numbers = label_counts(config, task, train)
    result = compare.run_probe(
        task, extractors, train, test, numbers, range(config.seed, config.seed + config.seeds), config.probe, note
    )
    result = replace(result, notes=(*result.notes, *overlap_notes(config, test)))
    return Evaluation(result, _write(config, task, result))


def _task(config: EvalConfig) -> str:
    if config.masks and config.task != "probe":
        raise ConfigError(f"task {config.task} takes no masks; use `probe`, or leave out --masks")
    return "readout" if config.masks else config.task


def load_sets(config: EvalConfig, student_px: tuple[int, int], note: Note) -> tuple[LabelledSet, LabelledSet]:
    """Images to draw labels from, and images held out. Raises: InputError, ConfigError."""
    height, width = height_width(config.px or student_px)
    recipe = TransformRecipe(resize=config.resize, height=height, width=width)
    reader = LabelledReader(config.images, config.masks, recipe)
    names = () if config.masks else class_names_of(reader.items)
    if not names and not config.masks:
        raise ConfigError(
            f"{config.images}: no class folders and no --masks; give one of them, or there is nothing to score"
        )
    if config.test_images:
        if config.test_images == config.images:
            raise ConfigError(
                f"{config.images} is both --images and --test-images; leave out --test-images to split it"
            )
        held_out = LabelledReader(config.test_images, config.test_masks, recipe)
        rows = [_limited(range(len(each.items)), config.limit) for each in (reader, held_out)]
        train, test = reader.read(names, note, rows[0]), held_out.read(names, note, rows[1], "held out/")
    else:
        items = reader.items
        parts = split_by_key(
            [item.key for item in items], [item.label for item in items], config.test_share, config.seed
        )
        train, test = (reader.read(names, note, _limited(part, config.limit)) for part in parts)
    if config.masks and config.foreground:
        return train.foreground(), test.foreground()
    return train, test


def _limited(rows: Sequence[int], limit: int | None) -> Sequence[int]:
    """At most half of `limit` rows, spread evenly over the listing so that every class keeps its share."""
    if limit is None or len(rows) <= limit // 2:
        return rows
    return [rows[idx] for idx in np.linspace(0, len(rows) - 1, limit // 2).astype(int)]


def label_counts(config: EvalConfig, task: str, train: LabelledSet) -> list[int | None]:
    """Numbers of labelled images to score from; None is all of them."""
    if config.labelled is not None:
        return [None if num == "all" else int(num) for num in config.labelled]
    few = FEW_MASKS if task == "readout" else tuple(num * len(train.class_names) for num in FEW_PER_CLASS)
    return [*(num for num in few if num < len(train)), None]


def overlap_notes(config: EvalConfig, test: LabelledSet) -> list[str]:
    """What to say when held-out images were part of distillation: they had no labels there, but were seen."""
    if config.test_images:
        return []
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
    from dtpipe.distill.downstream.base import random_initialisation, raw_pixels, student_extractor
    from dtpipe.distill.student.load import load_student

    device = pick_device(config.device)
    student = load_student(config.checkpoint)
    size = config.probe.batch_size
    extractors: list[FeatureExtractor | PerSeed] = [
        raw_pixels(),
        random_initialisation(student.spec, train.images, size, device),
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
    import torch

    from dtpipe.distill.downstream.base import FeatureExtractor
    from dtpipe.distill.stream.batch import student_images
    from dtpipe.extract.encode import row_noise
    from dtpipe.extract.teachers.base import Generator
    from dtpipe.extract.teachers.registry import load_teacher

    teacher = load_teacher(config, device)
    spec = teacher.spec
    if isinstance(teacher, Generator):
        raise TeacherError(f"{config.path}: a {spec.kind} teacher makes its own images and cannot encode these")
    size = image_px or spec.image_px
    views = [ViewSpec(draw=0, timestep=timestep if spec.num_timesteps is not None else None)]

    def encode(images: Tensor) -> dict[str, Tensor]:
        keys = [blake3(image.numpy().tobytes()).hexdigest() for image in images.contiguous()]
        pixels = student_images(images.to(device), size)  # (B, 3, H, W)
        rows = [row_noise(seed, key, views, spec, size) for key in keys]
        noise = {
            stream: torch.from_numpy(np.stack([row[stream] for row in rows])).to(device) for stream in spec.noise_shapes
        }
        features = teacher.encode(pixels, noise, views)
        return {level: values[:, 0] for level, values in features.items()}

    return FeatureExtractor(name, encode)


def result_path(config: EvalConfig, task: str) -> Path:
    """Where the result goes. Raises: ConfigError for a checkpoint outside a run folder when no --out says."""
    if config.out:
        return Path(config.out)
    run = Path(config.checkpoint)
    run = run if run.is_dir() else run.parent
    return run / "eval" / f"{task}.json"


def _write(config: EvalConfig, task: str, result: ProbeResult) -> Path:
    path = result_path(config, task)
    document = {"config": config.model_dump(mode="json"), **result.to_json()}
    try:
        write_whole(path, json.dumps(document, indent=2, default=str) + "\n")
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; choose another --out") from err
    return path
