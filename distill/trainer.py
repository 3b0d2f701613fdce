"""The training loop: stream -> student and regressor -> loss -> optimiser, resumable at every step.

The state of a run is (weights, optimiser, position), since random numbers are a function of (seed, step, rank); all of it is
in last.pt, so a run that was killed and goes on takes the same steps, bit for bit on a CPU with as many threads, and the same
batches on any number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import keep_epoch, load_checkpoint, save_checkpoint
from dtpipe.distill.engine.optim import build_optimizer, learning_rate, set_learning_rate
from dtpipe.distill.engine.progress import Meter, OnProgress, RunResult, TrainProgress, shares, waiting_advice
from dtpipe.distill.engine.ranks import ALONE, Ranks, join_ranks
from dtpipe.distill.engine.run_folder import LAST, RunFolder, read_metrics
from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.losses.features import feature_loss
from dtpipe.distill.stream.batch import FeatureBatch, student_images
from dtpipe.distill.stream.data import OpenedData, OpenSource, open_data
from dtpipe.distill.stream.live import LiveTeacher, OpenLive
from dtpipe.distill.stream.order import StreamPosition, step_seed
from dtpipe.distill.stream.stream import FeatureStream, StreamSettings
from dtpipe.distill.student.distiller import (
    build_distiller,
    choose_levels,
    freeze_unused,
    norms_for,
    pick_device,
    pick_precision,
    student_size,
    synchronise_norms,
)
from dtpipe.distill.student.student import spec_to_dict
from dtpipe.manifests.errors import DivergedError, PlanChangedError, StoppedError
from dtpipe.manifests.stopping import StopRequest

NUM_KEYS_SHOWN = 8


def train(
    config: DistillConfig,
    live: OpenLive | None = None,
    on_progress: OnProgress | None = None,
    fresh: bool = False,
    open_source: OpenSource = open_data,
    stop: StopRequest | None = None,
) -> RunResult:
    """Train a student as `config` says, going on where an earlier call with the same config stopped.

    `live` opens the teacher where samples are encoded anew; `open_source` gives the data, by default that of the datasets.
    A stop is asked for by signals, or by `stop` where no signal arrives.

    Raises: ConfigError, PlanChangedError and LockHeldError before any work; DivergedError on a loss that is not finite;
    StoppedError after SIGTERM or SIGINT, once the state is saved; what the readers raise on damaged data.
    """
    with join_ranks(config.device) as ranks:
        device = pick_device(config.device)
        data = _open_in_turn(ranks, open_source, config)
        teacher = live(data.source, device) if live is not None else None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            trainer = Trainer(config, data, device, teacher, ranks)
            with ExitStack() as stack, StopRequest() as signals:
                folder = _hold_folder(config, fresh, data, ranks, stack)
                return run(trainer, folder, stop or signals, on_progress or _ignore)


def _open_in_turn(ranks: Ranks, open_source: OpenSource, config: DistillConfig) -> OpenedData:
    """The data, opened by the first rank before the others, who find what it left in the run folder. Raises: on all ranks."""
    opened: list[OpenedData] = []
    ranks.first(lambda: opened.append(open_source(config)))
    return opened[0] if opened else open_source(config)


def _hold_folder(
    config: DistillConfig, fresh: bool, data: OpenedData, ranks: Ranks, stack: ExitStack
) -> RunFolder | None:
    """The run folder, held by the first rank until `stack` closes; None on the others. Raises: as `RunFolder.open`, on all."""
    held: list[RunFolder] = []
    ranks.first(lambda: held.append(stack.enter_context(RunFolder.open(config, fresh, data))))
    return held[0] if held else None


class Trainer:
    """Model, optimiser and stream of one run, and the steps over them."""

    def __init__(
        self,
        config: DistillConfig,
        data: OpenedData,
        device: torch.device,
        live: LiveTeacher | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.data, self.device, self.ranks = config, data, device, ranks
        levels = choose_levels(data.source.levels, config.levels)
        self.image_px = student_size(config, data.student_px)
        self.model = build_distiller(config, levels, self.image_px, self.ranks.size).to(device).train()
        if config.sync_bn:
            self.model = synchronise_norms(self.model, device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        freeze_unused(self.model, device)
        network: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        self.network = self.ranks.wrap(network, device)
        self.ema = ModelEmaV3(self.model.student, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.optimizer = build_optimizer(self.model, config)
        self.watch = Stopwatch(device)
        settings = stream_settings(config, tuple(level.name for level in levels), self.ranks)
        self.stream = FeatureStream(data.source, settings, device, live, data.sampling, self.watch)
        self.num_steps = config.epochs * self.stream.batches_per_epoch
        self.num_warmup = config.num_warmup_steps(self.stream.batches_per_epoch)
        self.precision = pick_precision(config.precision, device)
        self.position = StreamPosition()
        self.step = 0
        self.grad_norm = 0.0
        self.meter = Meter(self.watch)

    def steps(self) -> Generator[FeatureBatch, None, None]:
        """Take the optimiser steps that are left, from the position on; yields the last part's batch after each.

        Raises: DivergedError naming the samples when a loss or a gradient is not finite.
        """
        parts: list[tuple[FeatureBatch, Tensor]] = []
        for batch in self.stream.batches(self.position):
            if not parts:
                torch.manual_seed(step_seed(self.config.seed, self.step, self.ranks.rank))
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

        The sum over parts and ranks is the gradient of the global batch; the mean that ranks take of it is undone here.
        """
        images = student_images(batch.images, self.image_px)
        with norms_for(self.model, batch.smallest), self.ranks.part(self.network, batch.last):
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                regressed = self.network(images)
            loss = feature_loss(regressed, batch.levels, self.config.loss, self.data.level_weights)
            (loss.total * (batch.weight * self.ranks.size)).backward()  # type: ignore[no-untyped-call]
        self.meter.add(loss, batch.weight)
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

    def _check_step(self, parts: list[tuple[FeatureBatch, Tensor]]) -> None:
        """Clip the gradient; then the one wait for the device in a step: losses of all parts and the gradient's norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or math.inf)
        *losses, self.grad_norm = torch.stack([*(loss for _, loss in parts), norm]).tolist()
        bad = next(
            ((batch, loss) for (batch, _), loss in zip(parts, losses, strict=True) if not math.isfinite(loss)), None
        )
        if bad is None and math.isfinite(self.grad_norm):
            return
        keys = bad[0].keys if bad else [key for batch, _ in parts for key in batch.keys]
        found = self.ranks.gather(
            (bad is None, f"the loss is {bad[1]}" if bad else f"the gradient's norm is {self.grad_norm}", keys)
        )
        _, what, named = min(
            found, key=lambda each: each[0]
        )  # a rank whose loss it is, before those that got its gradients
        raise _diverged(what, self.step, named)


def _ignore(_progress: TrainProgress) -> None:
    pass


def run(trainer: Trainer, folder: RunFolder | None, stop: StopRequest, on_progress: OnProgress) -> RunResult:
    """Take the steps that are left in a folder, logging and saving on the way; see `train`. Only the first rank has the folder."""
    _resume(trainer, folder)
    resumed, started, saved, num_images = trainer.step, time.perf_counter(), time.monotonic(), 0
    with closing(trainer.steps()) as steps:
        for batch in steps:
            num_images += batch.num_global
            done = trainer.step == trainer.num_steps
            if done or trainer.step % trainer.config.log_every == 0:
                _report(trainer, folder, batch, on_progress)
            number, due = trainer.ranks.most(stop.signal or 0, time.monotonic() - saved > trainer.config.save_every_s)
            if trainer.position.batch_idx == 0 or number or due:
                _save(trainer, folder)
                saved = time.monotonic()
            if number and not done:
                raise _stopped(Signals(number), trainer)
    return _result(trainer, folder, resumed, time.perf_counter() - started, num_images)


def _resume(trainer: Trainer, folder: RunFolder | None) -> None:
    """Take up the checkpoint that the first rank finds."""
    state = trainer.ranks.first(lambda: load_checkpoint(folder.last) if folder and folder.last.exists() else None)
    if state is not None:
        trainer.restore(state, str(Path(trainer.config.out) / LAST))
    trainer.ranks.first(lambda: folder.take_up(trainer.step, trainer.config.tensorboard) if folder else None)


def _report(trainer: Trainer, folder: RunFolder | None, batch: FeatureBatch, on_progress: OnProgress) -> None:
    meter, trainer.meter = trainer.meter, Meter(trainer.watch)
    seconds, losses = meter.seconds(), meter.losses(trainer.ranks)
    if folder is None:
        return
    spent, spent_on = sum(seconds.values()), shares(seconds)
    progress = TrainProgress(
        step=trainer.step,
        num_steps=trainer.num_steps,
        epoch=batch.epoch + 1,
        num_epochs=trainer.config.epochs,
        lr=trainer.optimizer.param_groups[0]["lr"],
        grad_norm=trainer.grad_norm,
        losses=losses,
        throughput_img_s=meter.num_images / spent,
        remaining_s=(trainer.num_steps - trainer.step) * spent / meter.num_steps,
        shares=spent_on,
        advice=waiting_advice(spent_on, trainer.config.read_threads, trainer.config.prefetch),
    )
    folder.log(progress.record())
    on_progress(progress)


def _save(trainer: Trainer, folder: RunFolder | None) -> None:
    def write() -> None:
        assert folder is not None  # this is the first rank
        save_checkpoint(folder.last, trainer.state())
        if trainer.position.batch_idx == 0:
            keep_epoch(folder.last, trainer.position.epoch, trainer.config.keep_checkpoints)

    with trainer.watch.time("save"):
        trainer.ranks.first(write)


def _result(trainer: Trainer, folder: RunFolder | None, resumed: int, seconds: float, num_images: int) -> RunResult:
    last_line = trainer.ranks.first(lambda: read_metrics(folder.path)[-1] if folder else {})
    return RunResult(
        run_dir=Path(trainer.config.out),
        checkpoint=Path(trainer.config.out) / LAST,
        num_steps=trainer.num_steps,
        num_epochs=trainer.config.epochs,
        num_samples=trainer.stream.epoch_size,
        resumed_step=resumed,
        losses={
            name: value
            for name, value in last_line.items()
            if name.split("/")[0] in ("loss", *trainer.config.loss.weights)
        },
        seconds=seconds,
        throughput_img_s=num_images / seconds,
        shares=shares(trainer.watch.seconds()),
        flips=trainer.stream.flips,
        peak_lr=trainer.config.peak_lr,
        rank=trainer.ranks.rank,
        num_ranks=trainer.ranks.size,
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
        read_threads=config.read_threads,
        prefetch=config.prefetch,
        rank=ranks.rank,
        world=ranks.size,
    )


def _diverged(what: str, step: int, keys: Sequence[str]) -> DivergedError:
    shown = ", ".join(keys[:NUM_KEYS_SHOWN]) + (
        f" and {len(keys) - NUM_KEYS_SHOWN} more" if len(keys) > NUM_KEYS_SHOWN else ""
    )
    return DivergedError(
        f"{what} in step {step + 1}, in a batch of {shown}; last.pt holds an earlier step: "
        "train anew with a lower distill.lr, a longer warm-up or distill.clip_grad"
    )


def _stopped(number: Signals, trainer: Trainer) -> StoppedError:
    error = StoppedError(
        f"stopped by {number.name} after step {trainer.step} of {trainer.num_steps}; {Path(trainer.config.out) / LAST} is saved, "
        "run again to go on"
    )
    error.exit_code = 128 + number  # 143 for SIGTERM, 130 for SIGINT
    return error
