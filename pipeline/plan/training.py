"""What a distillation would take: hours and memory, from a few steps on random features of the dataset's shapes."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dtpipe.distill.config import DistillConfig, DistillRecipeConfig
from dtpipe.distill.engine.device import autocast, pick_precision, training_device
from dtpipe.distill.labels.targets import Targets, choose_targets
from dtpipe.distill.losses.labels import mixed_losses
from dtpipe.distill.losses.whitening import Whitener
from dtpipe.distill.stream.data import TrainingData
from dtpipe.distill.stream.decode import SentLevels
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.stream.stream import FeatureStream
from dtpipe.distill.stream.timesteps import several_timesteps
from dtpipe.distill.stream.transfer import DeviceCopies
from dtpipe.distill.student.distiller import Distiller, build_distiller, student_size, with_timed_heads
from dtpipe.distill.trainer import stream_settings
from dtpipe.manifests.layout.arrays import stored_arrays
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import FeatureSource
from dtpipe.manifests.schema import IMAGE
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, format_bytes, format_seconds
from dtpipe.pipeline.plan.extraction import PRICES, ExtractionPlan, store_speed
from dtpipe.pipeline.plan.limits import Limits, training_limits
from dtpipe.pipeline.plan.prices import CachedOrLive, PlanConfig, cached_or_live
from dtpipe.pipeline.plan.probe import peak_memory

if TYPE_CHECKING:
    import torch

TIMED_STEPS = 3
CPU_IMAGES = 16  # per timed pass; a micro-batch that fills a GPU would overfill a machine without one


@dataclass(frozen=True)
class TrainingPlan:
    """What a distillation would take; steps are timed on random features of the dataset's shapes."""

    student: str
    num_parameters: int
    regressor_parameters: int
    """Of all but the student: the decoder of soft labels too."""
    num_samples: int
    num_steps: int
    seconds: float
    throughput_img_s: float
    memory_bytes: int
    """With `timed_images` at a time."""
    timed_images: int
    """Per pass that was timed: a micro-batch, on a CPU at most `CPU_IMAGES`."""
    device: str
    epochs: int
    read_bytes: int
    """Stored bytes read per epoch: of each sample its image, and one view of each level that is learned from."""
    binds: str
    """What lets through the fewest images."""
    limits: Limits
    teacher_s: float | None = None
    """Per image that is encoded live; None where none is."""
    decode_s: float = 0.0
    """Of a core, per image that is read; 0 where none is."""


def plan_training(config: DistillConfig, data: TrainingData, prices: PlanConfig = PRICES) -> TrainingPlan:
    """Time a few steps of the student and readings of data that exists, and the teacher where it runs live.

    Raises: what opening them raises.
    """
    opened = data.open(config)
    targets = choose_targets(config, opened)
    device = training_device(config.run.device)
    teacher = data.teacher(opened.source, device)
    settings = stream_settings(config, targets.names)
    stream = FeatureStream(opened.source, settings, device, teacher, opened.sampling)
    parts = [FeatureDataset.open(url, allow_incomplete=True) for url in config.datasets]
    sample_bytes = bytes_read_per_sample(parts, targets.names, config.join)
    on_core_s, on_device_s = _time_reading(stream, targets.names, device) if config.reencode < 1 else (0.0, 0.0)
    store = _slowest([store_speed(url, prices) for url in config.datasets], prices)
    reads = Reads(sample_bytes, on_core_s, on_device_s, store)
    timed = with_timed_heads(config, several_timesteps(opened.source, targets.feature_names))
    image_px = student_size(config, opened.student_px)
    plan = time_training(timed, device, targets, image_px, stream.epoch_size, reads)
    if teacher is None:
        return plan
    teacher_s = _time_teacher(teacher, opened.source, min(_timed_images(config, device), len(stream.rows)), device)
    return with_teacher(plan, config, teacher_s)


def with_teacher(plan: TrainingPlan, config: DistillRecipeConfig, teacher_s: float) -> TrainingPlan:
    """A plan with the time of the live teacher, which takes `teacher_s` per image, where one runs."""
    if not config.reencode:
        return plan
    seconds = plan.seconds + config.reencode * teacher_s * plan.num_samples * config.epochs
    return replace(plan, seconds=seconds, teacher_s=teacher_s)


def compared(extraction: ExtractionPlan, training: TrainingPlan, epochs: int, prices: PlanConfig) -> CachedOrLive:
    """Cached against live for a planned training: where stored features hold it up, what that costs counts too."""
    held_up_s = 1 / training.limits.rate - 1 / training.throughput_img_s
    live_s = extraction.teacher_s / extraction.views - held_up_s
    live_h = max(0.0, live_s) * training.num_samples / 3600
    stored_tb = extraction.stored_bytes / 1e12
    return cached_or_live(prices, extraction.comparison.extraction_h, stored_tb, live_h, epochs)


@dataclass(frozen=True)
class Reads:
    """What training reads of one sample, from stored features."""

    sample_bytes: float
    decode_s: float
    """Of a core; 0 where no stored features are read."""
    restore_s: float
    """Of the device; 0 as well."""
    store: tuple[str, float]
    """What the dataset lies on, and its MB/s."""


def bytes_read_per_sample(parts: Sequence[FeatureDataset], names: Collection[str], joined: bool) -> float:
    """Stored bytes of an image and one view of each level in `names`, mean over samples; a level that several joined
    datasets have as views of one teacher is read from one of them.
    """
    from dtpipe.pipeline.report.inspect import shard_table, stored_bytes

    total, num_rows = 0.0, 0
    views: Counter[str] = Counter()
    of_level: Counter[str] = Counter()
    for idx, part in enumerate(parts):
        stored = stored_bytes(shard_table(Store(part.url), part))
        num_rows = max(num_rows, len(part.columns)) if joined else num_rows + len(part.columns)
        total += stored.get(IMAGE, (0, 0))[1] if not joined or not total else 0
        for spec in stored_arrays(part.recipe).values():
            if spec.level is not None and spec.level in names and spec.name in stored:
                key = spec.level if joined else f"{idx}/{spec.level}"
                of_level[key] += stored[spec.name][1]
                views[key] = views[key] + len(part.recipe.views) if spec.name == spec.level else views[key]
    return (total + sum(size / views[key] for key, size in of_level.items())) / max(num_rows, 1)


def _slowest(stores: Sequence[tuple[str, float]], prices: PlanConfig) -> tuple[str, float]:
    return min(stores, key=lambda store: store[1], default=("disk", prices.disk_mb_s))


def _time_reading(stream: FeatureStream, names: Sequence[str], device: torch.device) -> tuple[float, float]:
    """Seconds per image, once its bytes are at hand: of a core, to what the device takes, and of the device, to
    features; after a warm-up.
    """
    import torch

    rows, copies = stream.rows[:CPU_IMAGES], DeviceCopies(device)
    on_core_s = on_device_s = 0.0
    for _ in range(2):
        started = time.process_time()  # of all threads
        _, coded = stream.source.read(rows, names, np.zeros_like(rows))
        on_core_s = time.process_time() - started
        started = time.perf_counter()
        SentLevels.send(coded, copies).receive(copies)
        if device.type == "cuda":
            torch.cuda.synchronize()
        on_device_s = time.perf_counter() - started
    return on_core_s / len(rows), on_device_s / len(rows)


def _time_teacher(teacher: LiveTeacher, source: FeatureSource, num: int, device: torch.device) -> float:
    """Seconds per image of noise and a live encoding, after a warm-up."""
    import torch

    samples = LiveSamples.first([source.columns.keys[row] for row in source.columns.ok_rows[:num]])
    images = torch.zeros((len(samples), *source.image_px, 3), dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        teacher.encode(images, samples, teacher.prepare(samples))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[-1] / len(samples)


def time_training(
    config: DistillRecipeConfig,
    device: torch.device,
    targets: Targets,
    image_px: tuple[int, int],
    num_samples: int,
    reads: Reads,
) -> TrainingPlan:
    """Time forward, loss and backward of a micro-batch of random targets, and scale up to all steps."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = build_distiller(config, targets.features, image_px, labels=targets.labels).to(device).train()
    num = _timed_images(config, device)
    timings = list(itertools.islice(_time_steps(model, config, device, targets, image_px, num), 1 + TIMED_STEPS))
    per_image_s = min(timings[1:]) / num
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    cached = reads.sample_bytes * (1 - config.reencode)
    limits = training_limits(
        on_gpu=device.type != "cpu",
        cpus=os.cpu_count() or 1,
        step_img_s=1 / per_image_s,
        decode_s=reads.decode_s * (1 - config.reencode),
        restore_s=reads.restore_s * (1 - config.reencode),
        read_bytes=cached,
        store=reads.store,
    )
    return TrainingPlan(
        student=config.student.name,
        num_parameters=sum(p.numel() for p in model.student.parameters()),
        regressor_parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith("student.")),
        num_samples=num_samples,
        num_steps=config.epochs * -(-num_samples // config.batch_size),
        seconds=num_samples * config.epochs / limits.rate,
        throughput_img_s=1 / per_image_s,
        memory_bytes=memory,
        timed_images=num,
        device=device.type,
        epochs=config.epochs,
        read_bytes=round(cached * num_samples),
        binds=limits.binding,
        limits=limits,
        decode_s=reads.decode_s,
    )


def _timed_images(config: DistillRecipeConfig, device: torch.device) -> int:
    micro_batch = min(config.micro_batch or config.batch_size, config.batch_size)
    return min(micro_batch, CPU_IMAGES) if device.type == "cpu" else micro_batch


def _time_steps(
    model: Distiller,
    config: DistillRecipeConfig,
    device: torch.device,
    targets: Targets,
    image_px: tuple[int, int],
    micro_batch: int,
) -> Iterator[float]:
    """Seconds of one micro-batch after another."""
    import torch

    precision = pick_precision(config.precision, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    images = torch.rand(micro_batch, 3, *image_px, generator=generator, device=device) * 2 - 1
    levels = (*targets.features, *([targets.labels] if targets.labels else []))
    shapes = {level.name: (micro_batch, level.channels, level.height, level.width) for level in levels}
    encoded = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    timesteps = {level.name: torch.zeros(micro_batch, dtype=torch.int64, device=device) for level in levels}
    whitener = Whitener()  # whichever it is, it takes no longer
    while True:
        started = time.perf_counter()
        with autocast(precision, device):
            predicted = model(images, timesteps)
        losses = mixed_losses(predicted, encoded, targets, config, whitener=whitener)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started


def print_training(console: Console, plan: TrainingPlan) -> None:
    """The plan as lines."""
    teacher_ms = None if plan.teacher_s is None else f"{1000 * plan.teacher_s:.1f}"
    live = {} if teacher_ms is None else {"teacher": f"{teacher_ms} ms per image that it encodes live"}
    parameters, regressor = f"{plan.num_parameters / 1e6:.1f} M", f"{plan.regressor_parameters / 1e6:.1f} M"
    duration = f"about {format_seconds(plan.seconds)} for {plan.epochs} epochs"
    console.pairs(
        {
            "student": f"{plan.student}, {parameters} parameters; regressor {regressor}",
            "training": f"{duration}, {count_of(plan.num_steps, 'step')} ({plan.device})",
            "rate": f"{plan.throughput_img_s:.0f} img/s forward and backward, measured on random features",
            **live,
            "reads": f"{format_bytes(plan.read_bytes)} per epoch, of the views that are read",
            "limits": plan.limits.text(),
            "memory": f"about {format_bytes(plan.memory_bytes)} with {plan.timed_images} images at a time",
        }
    )
