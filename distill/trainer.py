"""The training loop: stream -> student and regressor -> loss -> optimiser, resumable at every step.

The state of a run is (weights, optimiser, position, random numbers); all of it is in last.pt, so a run that was killed
and goes on takes the same steps, bit for bit on a CPU with as many threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from signal import Signals
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from dtpipe.distill.batch import FeatureBatch, student_images
from dtpipe.distill.checkpoint import keep_epoch, load_checkpoint, save_checkpoint
from dtpipe.distill.config import DistillConfig
from dtpipe.distill.datasets import OpenedData, open_data
from dtpipe.distill.losses import feature_loss
from dtpipe.distill.model import build_distiller, choose_levels, norms_for, pick_device, pick_precision, student_size
from dtpipe.distill.optim import build_optimizer, learning_rate, set_learning_rate
from dtpipe.distill.order import StreamPosition
from dtpipe.distill.progress import Meter, OnProgress, RunResult, TrainProgress, shares
from dtpipe.distill.run_folder import RunFolder, read_metrics
from dtpipe.distill.stream import FeatureStream, LiveTeacher, StreamSettings
from dtpipe.distill.student import spec_to_dict
from dtpipe.distill.timing import StopRequest, Stopwatch, catch_stop_signals
from dtpipe.manifests.errors import DivergedError, PlanChangedError, StoppedError

NUM_KEYS_SHOWN = 8


def train(config: DistillConfig, live: LiveTeacher | None = None, on_progress: OnProgress | None = None, fresh: bool = False) -> RunResult:
    """Train a student as `config` says, going on where an earlier call with the same config stopped.

    Raises: ConfigError, PlanChangedError and LockHeldError before any work; DivergedError on a loss that is not finite;
    StoppedError after SIGTERM or SIGINT, once the state is saved; what the readers raise on damaged data.
    """
    device = pick_device(config.device)
    data = open_data(config)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        trainer = Trainer(config, data, device, live)
        with RunFolder.open(config, fresh) as folder, catch_stop_signals() as stop:
            return run(trainer, folder, stop, on_progress or _ignore)


class Trainer:
    """Model, optimiser and stream of one run, and the steps over them."""

    def __init__(self, config: DistillConfig, data: OpenedData, device: torch.device, live: LiveTeacher | None = None) -> None:
        self.config, self.data, self.device = config, data, device
        levels = choose_levels(data.source.levels, config.levels)
        self.image_px = student_size(config, data.student_px)
        self.model = build_distiller(config, levels, self.image_px).to(device).train()
        self.ema = ModelEmaV3(self.model.student, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.optimizer = build_optimizer(self.model, config)
        self.stream = FeatureStream(data.source, _stream_settings(config, tuple(level.name for level in levels)), device, live)
        self.num_steps = config.epochs * self.stream.batches_per_epoch
        self.num_warmup = config.num_warmup_steps(self.stream.batches_per_epoch)
        self.precision = pick_precision(config.precision, device)
        self.position = StreamPosition()
        self.step = 0
        self.grad_norm = 0.0
        self.watch = Stopwatch()
        self.meter = Meter(self.watch)

    def steps(self) -> Generator[FeatureBatch, None, None]:
        """Take the optimiser steps that are left, from the position on; yields the last part's batch after each.

        Raises: DivergedError naming the samples when a loss or a gradient is not finite.
        """
        parts: list[tuple[FeatureBatch, Tensor]] = []
        for batch in self.watch.waits("data", self.stream.batches(self.position)):
            with self.watch.time("model"):
                parts.append((batch, self.accumulate(batch)))
                if batch.last:
                    self._check_step(parts)
            if batch.last:
                with self.watch.time("optimiser"):
                    self.update(batch)
                parts = []
                yield batch

    def accumulate(self, batch: FeatureBatch) -> Tensor:
        """Add the gradients of a part of a global batch, weighted by its share of the samples; its loss, on the device.

        A part without samples adds nothing; so the sum over parts and ranks is the gradient of the global batch.
        """
        if not batch.keys:
            return torch.zeros((), device=self.device)
        weight = len(batch.keys) / batch.num_global
        images = student_images(batch.images, self.image_px)
        with norms_for(self.model, len(batch.keys)):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                regressed = self.model(images)
            loss = feature_loss(regressed, batch.levels, self.config.loss)
            (loss.total * weight).backward()  # type: ignore[no-untyped-call]
        self.meter.add(loss, weight)
        return loss.total.detach()

    def update(self, batch: FeatureBatch) -> None:
        """Step the optimiser with the gradients gathered since the last one, and move the position past the batch."""
        set_learning_rate(self.optimizer, self.rate())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position = self.stream.after(batch)
        if self.ema is not None:
            self.ema.update(self.model.student, self.step)
        self.meter.count_step(batch.num_global)

    def rate(self) -> float:
        """Learning rate of the coming step."""
        return learning_rate(self.step, self.num_steps, self.num_warmup, self.config.peak_lr, self.config.min_lr)

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on, in types that `weights_only` loading accepts."""
        return {
            "config": self.config.model_dump(mode="json"),
            "data_digest": self.data.digest,
            "student_spec": spec_to_dict(self.model.student.spec),
            "student": self.model.student.state_dict(),
            "regressor": self.model.regressor.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"step": self.step, "num_steps": self.num_steps, "num_warmup": self.num_warmup},
            "stream": {"epoch": self.position.epoch, "batch_idx": self.position.batch_idx},
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None},
        }

    def restore(self, state: dict[str, Any], where: str) -> None:
        """Take up the state of a checkpoint.

        Raises: PlanChangedError when it was trained on other data.
        """
        if state["data_digest"] != self.data.digest:
            raise PlanChangedError(
                f"{where} was trained on other data than {', '.join(self.config.datasets)} holds now; "
                "give the datasets it was trained on, or choose another --out"
            )
        self.model.student.load_state_dict(state["student"])
        self.model.regressor.load_state_dict(state["regressor"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["scheduler"]["step"]
        self.position = StreamPosition(**state["stream"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])

    def _check_step(self, parts: list[tuple[FeatureBatch, Tensor]]) -> None:
        """Clip the gradient; then the one wait for the device in a step: losses of all parts and the gradient's norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or math.inf)
        *losses, self.grad_norm = torch.stack([*(loss for _, loss in parts), norm]).tolist()
        for (batch, _), loss in zip(parts, losses, strict=True):
            if not math.isfinite(loss):
                raise _diverged(f"the loss is {loss}", self.step, batch.keys)
        if not math.isfinite(self.grad_norm):
            raise _diverged(f"the gradient's norm is {self.grad_norm}", self.step, [key for batch, _ in parts for key in batch.keys])


def _ignore(_progress: TrainProgress) -> None:
    pass


def run(trainer: Trainer, folder: RunFolder, stop: StopRequest, on_progress: OnProgress) -> RunResult:
    """Take the steps that are left in a folder, logging and saving on the way; see `train`."""
    if folder.last.exists():
        trainer.restore(load_checkpoint(folder.last), str(folder.last))
    folder.drop_metrics_after(trainer.step)
    resumed, started, saved, num_images = trainer.step, time.perf_counter(), time.monotonic(), 0
    with closing(trainer.steps()) as steps:
        for batch in steps:
            num_images += batch.num_global
            done = trainer.step == trainer.num_steps
            if done or trainer.step % trainer.config.log_every == 0:
                _report(trainer, folder, batch, on_progress)
            if trainer.position.batch_idx == 0 or stop.signal is not None or time.monotonic() - saved > trainer.config.save_every_s:
                _save(trainer, folder)
                saved = time.monotonic()
            if stop.signal is not None and not done:
                raise _stopped(stop.signal, trainer, folder)
    return _result(trainer, folder, resumed, time.perf_counter() - started, num_images)


def _report(trainer: Trainer, folder: RunFolder, batch: FeatureBatch, on_progress: OnProgress) -> None:
    meter, trainer.meter = trainer.meter, Meter(trainer.watch)
    seconds = meter.seconds()
    spent = sum(seconds.values())
    progress = TrainProgress(
        step=trainer.step,
        num_steps=trainer.num_steps,
        epoch=batch.epoch + 1,
        num_epochs=trainer.config.epochs,
        lr=trainer.optimizer.param_groups[0]["lr"],
        grad_norm=trainer.grad_norm,
        losses=meter.losses(),
        throughput_img_s=meter.num_images / spent,
        remaining_s=(trainer.num_steps - trainer.step) * spent / meter.num_steps,
        shares=shares(seconds),
    )
    folder.log(progress.record())
    on_progress(progress)


def _save(trainer: Trainer, folder: RunFolder) -> None:
    with trainer.watch.time("save"):
        save_checkpoint(folder.last, trainer.state())
        if trainer.position.batch_idx == 0:
            keep_epoch(folder.last, trainer.position.epoch, trainer.config.keep_checkpoints)


def _result(trainer: Trainer, folder: RunFolder, resumed: int, seconds: float, num_images: int) -> RunResult:
    last_line = read_metrics(folder.path)[-1]
    return RunResult(
        run_dir=folder.path,
        checkpoint=folder.last,
        num_steps=trainer.num_steps,
        num_epochs=trainer.config.epochs,
        num_samples=len(trainer.stream.rows),
        resumed_step=resumed,
        losses={name: value for name, value in last_line.items() if name.split("/")[0] in ("loss", *trainer.config.loss.weights)},
        seconds=seconds,
        throughput_img_s=num_images / seconds,
        shares=shares(trainer.watch.seconds),
        flips=trainer.stream.flips,
        peak_lr=trainer.config.peak_lr,
    )


def _stream_settings(config: DistillConfig, levels: tuple[str, ...]) -> StreamSettings:
    return StreamSettings(
        levels=levels,
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        flip=config.flip,
        reencode=config.reencode,
        read_threads=config.read_threads,
        prefetch=config.prefetch,
    )


def _diverged(what: str, step: int, keys: Sequence[str]) -> DivergedError:
    shown = ", ".join(keys[:NUM_KEYS_SHOWN]) + (f" and {len(keys) - NUM_KEYS_SHOWN} more" if len(keys) > NUM_KEYS_SHOWN else "")
    return DivergedError(
        f"{what} in step {step + 1}, in a batch of {shown}; last.pt holds an earlier step: "
        "train anew with a lower distill.lr, a longer warm-up or distill.clip_grad"
    )


def _stopped(number: Signals, trainer: Trainer, folder: RunFolder) -> StoppedError:
    error = StoppedError(
        f"stopped by {number.name} after step {trainer.step} of {trainer.num_steps}; {folder.last} is saved, run again to go on"
    )
    error.exit_code = 128 + number  # 143 for SIGTERM, 130 for SIGINT
    return error
