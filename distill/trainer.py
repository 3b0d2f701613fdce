"""One step of distillation: images -> student, regressor and decoder -> losses against features and soft labels.

The engine does the rest: it takes the steps, and saves, resumes and stops the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.device import autocast, pick_precision, seeded, training_device
from dtpipe.distill.engine.loop import run
from dtpipe.distill.engine.optim import build_optimizer, warmup_cosine
from dtpipe.distill.engine.progress import OnTrainProgress, RunResult
from dtpipe.distill.engine.ranks import ALONE, Ranks, join_ranks
from dtpipe.distill.engine.ray import train_on_ray
from dtpipe.distill.engine.recovery import newest_checkpoint
from dtpipe.distill.engine.run_folder import RunSettings
from dtpipe.distill.engine.timing import IDLE, Stopwatch
from dtpipe.distill.engine.trainer import Course
from dtpipe.distill.labels.decoder import DECODER, DECODER_EMA, DECODER_SPEC, decoder_record
from dtpipe.distill.labels.targets import choose_targets
from dtpipe.distill.losses.features import LevelValues, level_values
from dtpipe.distill.losses.fit import with_r2
from dtpipe.distill.losses.labels import mixed_losses
from dtpipe.distill.losses.whitening import Whitener
from dtpipe.distill.stream.batch import FeatureBatch, student_images
from dtpipe.distill.stream.data import STORED, OpenedData, TrainingData
from dtpipe.distill.stream.live import LiveTeacher
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.statistics import Statistics, run_statistics
from dtpipe.distill.stream.stream import FeatureStream, StreamSettings
from dtpipe.distill.stream.timesteps import several_timesteps
from dtpipe.distill.student.distiller import (
    build_distiller,
    freeze_unused,
    norms_for,
    student_size,
    synchronise_norms,
    with_timed_heads,
)
from dtpipe.distill.student.student import spec_to_dict
from dtpipe.distill.student.timed import has_timed_heads
from dtpipe.manifests.phases import phase
from dtpipe.manifests.stopping import StopRequest

_MOST_WAITING = 0.05
_REMEDY = "train anew with a lower distill.lr, a longer warm-up or distill.clip_grad"
SMALLER = "train anew in another --out with --micro-batch, which takes each batch in smaller passes"


@dataclass(frozen=True)
class DistillResult(RunResult):
    """What a distillation left behind."""

    flips: bool = False
    """Whether images were flipped."""
    peak_lr: float = 0.0


def train(
    config: DistillConfig,
    data: TrainingData = STORED,
    on_progress: OnTrainProgress | None = None,
    fresh: bool = False,
    stop: StopRequest | None = None,
) -> DistillResult:
    """Train a student as `config` says, going on where an earlier call with the same config stopped.

    Raises: ConfigError, PlanChangedError and LockHeldError before any work; what the readers raise on damaged data;
    else as the engine's `run`.
    """
    with join_ranks(config.run.device) as ranks:
        device = training_device(config.run.device)
        ranks.first(run_settings(config, fresh=fresh).refuse_other)  # before a look at images leaves its result there
        with phase("opening the data"):
            opened = ranks.in_turn(lambda: data.open_checked(config))
        with phase("opening the teacher"):
            teacher = data.teacher(opened.source, device)
        ranks.first(run_settings(config, opened, fresh).refuse_other)
        ranks.first(lambda: _refuse_student(config, opened, ranks.size))  # before all images are looked at
        regressed = choose_targets(config, opened).feature_names
        statistics = ranks.first(lambda: run_statistics(config, opened, regressed, device, teacher))
        with seeded(config.seed, device):
            with phase("building the student"):
                trainer = Distillation(config, opened, device, teacher, ranks, statistics)
            result = run(trainer, run_settings(config, opened, fresh), ranks, on_progress, stop)
    own = {field.name: getattr(result, field.name) for field in fields(result)}
    return DistillResult(**own, flips=trainer.stream.flips, peak_lr=config.peak_lr)


def _refuse_student(config: DistillConfig, opened: OpenedData, num_ranks: int) -> None:
    """Raises: ConfigError when the student cannot be built for the data; takes no weights and no memory for it."""
    recipe = config.model_copy(update={"student": config.student.model_copy(update={"pretrained": False})})
    targets = choose_targets(config, opened)
    with torch.device("meta"):
        build_distiller(recipe, targets.features, student_size(config, opened.student_px), num_ranks, targets.labels)


def train_with_workers(
    config: DistillConfig,
    num_workers: int,
    gpus: bool,
    data: TrainingData = STORED,
    on_progress: OnTrainProgress | None = None,
    fresh: bool = False,
) -> DistillResult:
    """`train` on workers of the Ray cluster that this process is connected to; each opens data and teacher itself."""
    shared = config.run.model_copy(update={"out": str(Path(config.run.out).absolute())})
    config = config.model_copy(update={"run": shared})
    run_settings(config, fresh=fresh).refuse_other()  # what is wrong with the folder is said before any worker starts
    work = partial(_work, config, data)
    return train_on_ray(
        work, DistillResult, Path(config.run.out), num_workers, gpus, config.run.max_restarts, on_progress
    )


def _work(config: DistillConfig, data: TrainingData, stop: StopRequest) -> DistillResult:
    return train(config, data, stop=stop)


def run_settings(config: DistillConfig, data: OpenedData | None = None, fresh: bool = False) -> RunSettings:
    """The run as its folder knows it."""
    settings = RunSettings(Path(config.run.out), "distill", config, fresh=fresh)
    if data is None:
        return settings
    return replace(settings, identity={"data_digest": data.digest}, data=data.record, sections=data.sections)


class Distillation:
    """Student, regressor, decoder and stream of one run, and the losses of a batch."""

    def __init__(
        self,
        config: DistillConfig,
        data: OpenedData,
        device: torch.device,
        live: LiveTeacher | None = None,
        ranks: Ranks = ALONE,
        statistics: Statistics | None = None,
    ) -> None:
        """`statistics`: of the targets, without which there is no R² and no whitening by the dataset."""
        self.config, self.data, self.device = config, data, device
        self.targets = targets = choose_targets(config, data)
        self.image_px = student_size(config, data.student_px)
        self.whitener = Whitener(config.loss.whiten, statistics, device)
        decided = ranks.first(lambda: _decided(config, data, targets.feature_names, live))
        model = build_distiller(decided, targets.features, self.image_px, ranks.size, targets.labels)
        self.model = model.to(device).train()
        if config.sync_bn:
            self.model = synchronise_norms(self.model, device)
        if config.run.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        freeze_unused(self.model, device)
        # static shapes: with others, which code runs, and so the last bits, would depend on which batch came first
        compiled = partial(torch.compile, dynamic=False)
        network: nn.Module = compiled(self.model) if config.run.compile else self.model  # type: ignore[assignment]
        self.network = ranks.wrap(network, device)
        self._level_values: LevelValues = compiled(level_values) if config.run.compile else level_values
        self.ema = _average(self.model.student, config)
        self.decoder_ema = _average(self.model.decoder, config)
        self.optimizer = build_optimizer(self.model, config.opt, config.peak_lr, config.weight_decay, config.betas)
        self.watch = Stopwatch(device)
        settings = stream_settings(decided, targets.names, ranks)
        self.stream = FeatureStream(data.source, settings, device, live, data.sampling, self.watch)
        self.course = _course(config, self.stream, device)

    def batches(self, step: int) -> Iterator[FeatureBatch]:
        """Micro-batches from a step's global batch on."""
        return self.stream.batches(StreamPosition(*divmod(step, self.stream.batches_per_epoch)))

    def losses(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Equation (6) or the part of it that is trained, its terms, those of each level, and what R² is against."""
        images = student_images(batch.images, self.image_px)
        with norms_for(self.model, batch.smallest), autocast(self.course.precision, self.device):
            predicted = self.network(images, batch.timesteps)
        weights = self.data.level_weights
        return mixed_losses(
            predicted, batch.levels, self.targets, self.config, weights, self.whitener, self._level_values
        )

    def learning_rate(self, step: int) -> float:
        """Warm-up, then half a cosine."""
        num_warmup = self.config.num_warmup_steps(self.stream.batches_per_epoch)
        return warmup_cosine(step, self.course.num_steps, num_warmup, self.config.peak_lr, self.config.min_lr)

    def updated(self, step: int) -> None:
        """Move the averages of student and decoder."""
        for average, module in ((self.ema, self.model.student), (self.decoder_ema, self.model.decoder)):
            if average is not None:
                average.update(module, step)

    def named(self) -> Mapping[str, Any]:
        """What a checkpoint holds."""
        return {
            "student_spec": spec_to_dict(self.model.student.spec),
            "student": self.model.student,
            "regressor": self.model.regressor,
            "ema": self.ema.module if self.ema is not None else None,
            "flips": self.stream.flips,
            **self._decoder(),
        }

    def _decoder(self) -> Mapping[str, Any]:
        """A checkpoint of a run without soft labels says nothing of it."""
        if self.targets.labels is None:
            return {}
        average = self.decoder_ema.module if self.decoder_ema is not None else None
        record = decoder_record(self.targets.labels, self.targets.classes, self.config)
        return {DECODER_SPEC: record, DECODER: self.model.decoder, DECODER_EMA: average}


def _average(module: nn.Module | None, config: DistillConfig) -> ModelEmaV3 | None:
    """A moving average of a module, where there is one and the settings ask for it."""
    if module is None or not config.ema_decay:
        return None
    return ModelEmaV3(module, decay=config.ema_decay, use_warmup=True)


def _decided(config: DistillConfig, data: OpenedData, levels: Sequence[str], live: LiveTeacher | None) -> DistillConfig:
    """The settings with what they leave open: heads that know the timestep where targets are of several, and flips
    where a live teacher encodes every image. A run that began without either goes on without."""
    timed = config.regressor.timestep is None and several_timesteps(data.source, levels)
    flips = config.flip is None and config.reencode == 1 and live is not None and not live.makes_images
    settings = run_settings(config)
    newest = newest_checkpoint(settings.last, settings.kind) if timed or flips else None
    if newest is not None:
        timed = timed and has_timed_heads(newest.state["regressor"] or ())
        flips = flips and newest.state["flips"] is True
    with_flips = config.model_copy(update={"flip": True}) if flips else config
    return with_timed_heads(with_flips, timed)


def _course(config: DistillConfig, stream: FeatureStream, device: torch.device) -> Course:
    return Course(
        num_steps=config.epochs * stream.batches_per_epoch,
        steps_per_epoch=stream.batches_per_epoch,
        epoch_size=stream.epoch_size,
        seed=config.seed,
        precision=pick_precision(config.precision, device),
        clip_grad=config.clip_grad,
        log_every=config.run.log_every,
        save_every=stream.batches_per_epoch,
        save_every_s=config.run.save_every_s,
        num_kept=config.run.keep_checkpoints,
        tracking=config.run,
        logged=with_r2,
        advice=lambda shares: waiting_advice(shares, config.run.read_threads, config.run.prefetch),
        remedy=_REMEDY,
        smaller=SMALLER,
    )


def stream_settings(config: DistillConfig, levels: tuple[str, ...], ranks: Ranks = ALONE) -> StreamSettings:
    """What of a run's settings its stream goes by."""
    return StreamSettings(
        levels=levels,
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        flip=config.flip,
        equivariant=config.equivariant,
        reencode=config.reencode,
        read_threads=config.run.read_threads,
        prefetch=config.run.prefetch,
        prefetch_bytes=config.run.prefetch_mb * 10**6,
        rank=ranks.rank,
        world=ranks.size,
    )


def waiting_advice(shares: Mapping[str, float], read_threads: int, prefetch: int) -> str | None:
    """One sentence on what to change, when more than `_MOST_WAITING` of the time goes by waiting; else None."""
    waiting = shares.get(IDLE, 0.0)
    if waiting <= _MOST_WAITING:
        return None
    cpus = os.cpu_count() or 1
    if read_threads < cpus:
        what = f"raise distill.run.read_threads from {read_threads} to up to {cpus}"
    else:
        what = f"raise distill.run.prefetch from {prefetch}, or bring the dataset to a faster disk"
    return f"{waiting:.0%} of the time goes by waiting for data: {what}"
