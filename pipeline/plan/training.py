"""What a distillation would take: hours and memory, from a few steps on random features of the dataset's shapes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dtpipe.distill.config import DistillConfig, DistillRecipeConfig
from dtpipe.distill.engine.device import autocast, pick_precision, training_device
from dtpipe.distill.labels.targets import Targets, choose_targets
from dtpipe.distill.losses.labels import mixed_losses
from dtpipe.distill.losses.whitening import Whitener
from dtpipe.distill.stream.data import TrainingData
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.stream.stream import FeatureStream
from dtpipe.distill.stream.timesteps import several_timesteps
from dtpipe.distill.student.distiller import Distiller, build_distiller, student_size, with_timed_heads
from dtpipe.distill.trainer import stream_settings
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import FeatureSource
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, format_bytes, format_seconds
from dtpipe.pipeline.plan.extraction import peak_memory

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
    """Stored bytes read per epoch."""
    teacher_s: float | None = None
    """Per image that is encoded live; None where none is."""


def plan_training(config: DistillConfig, data: TrainingData) -> TrainingPlan:
    """Time a few steps of the student on data that exists, and the teacher where it runs live.

    Raises: what opening them raises.
    """
    opened = data.open(config)
    targets = choose_targets(config, opened)
    device = training_device(config.run.device)
    teacher = data.teacher(opened.source, device)
    settings = stream_settings(config, targets.names)
    stream = FeatureStream(opened.source, settings, device, teacher, opened.sampling)
    manifests = [FeatureDataset.open(url, allow_incomplete=True).manifest for url in config.datasets]
    stored_bytes = sum(manifest.totals.size_bytes for manifest in manifests if manifest is not None)
    timed = with_timed_heads(config, several_timesteps(opened.source, targets.feature_names))
    image_px = student_size(config, opened.student_px)
    plan = time_training(timed, device, targets, image_px, stream.epoch_size, stored_bytes)
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
    stored_bytes: int,
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
    return TrainingPlan(
        student=config.student.name,
        num_parameters=sum(p.numel() for p in model.student.parameters()),
        regressor_parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith("student.")),
        num_samples=num_samples,
        num_steps=config.epochs * -(-num_samples // config.batch_size),
        seconds=per_image_s * num_samples * config.epochs,
        throughput_img_s=1 / per_image_s,
        memory_bytes=memory,
        timed_images=num,
        device=device.type,
        epochs=config.epochs,
        read_bytes=stored_bytes,
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
            "reads": f"{format_bytes(plan.read_bytes)} per epoch",
            "memory": f"about {format_bytes(plan.memory_bytes)} with {plan.timed_images} images at a time",
        }
    )
