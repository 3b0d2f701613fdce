"""The loop of every optimisation, in the order in which it happens: resume, steps, report, save, stop.

A trainer says what a step computes, and the loop knows nothing of it. The state of a run is what the trainer names, its
optimiser and the number of steps taken; batches and random numbers are functions of (seed, step). So a run that was
killed and goes on takes the same steps: bit for bit on a CPU with as many threads, and the same batches on any number
of ranks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from typing import Generic

import torch
from torch import Tensor

from dtpipe.distill.engine.checkpoint import CheckpointIO
from dtpipe.distill.engine.optim import clip_limit, set_learning_rate
from dtpipe.distill.engine.progress import Meter, OnTrainProgress, RunResult, TrainProgress, losses_of, shares
from dtpipe.distill.engine.ranks import ALONE, Ranks
from dtpipe.distill.engine.record import refuse_other
from dtpipe.distill.engine.recovery import Newest, newest_checkpoint, take_up
from dtpipe.distill.engine.run_folder import RunFolder, RunSettings, changed_fields, read_metrics
from dtpipe.distill.engine.seeds import step_seed
from dtpipe.distill.engine.trainer import P, Trainer
from dtpipe.manifests.differences import refuse_differences
from dtpipe.manifests.errors import DivergedError, saying_what_to_lower
from dtpipe.manifests.stopping import StopRequest

_NUM_KEYS_SHOWN = 8
_TELLING_STEPS = 5  # fewer say nothing of where time goes: the first waits for what later ones find ready
TELL_EVERY_S = 2.0  # between lines of metrics.jsonl, where steps are slow, who waits is told of the last one
_log = logging.getLogger(__name__)


def run(
    trainer: Trainer[P],
    settings: RunSettings,
    ranks: Ranks = ALONE,
    on_progress: OnTrainProgress | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Take the steps that are left of the run in a folder, logging and saving on the way.

    Raises: as `RunFolder.open` before any step; else as `run_in`.
    """
    with ExitStack() as stack:
        folder = ranks.only_first(lambda: stack.enter_context(RunFolder.open(settings)))
        return run_in(folder, trainer, settings, ranks, on_progress, stop)


def run_in(
    folder: RunFolder | None,
    trainer: Trainer[P],
    settings: RunSettings,
    ranks: Ranks = ALONE,
    on_progress: OnTrainProgress | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """The same in a folder that the caller holds and lets go of; None on other ranks than the first.

    A stop is asked for by signals, or by `stop` where no signal arrives. Only the first rank writes and calls
    `on_progress`.

    Raises: DivergedError on a loss that is not finite; DeviceMemoryError; StoppedError after SIGTERM or SIGINT, once
    the state is saved.
    """
    course, loop = trainer.course, Loop(trainer, ranks)
    listener = on_progress if folder is not None else None
    with ExitStack() as stack, StopRequest() as signals:
        stop = stop or signals
        notes = _resume(loop, settings, folder)
        resumed, started, num_samples = loop.step, time.monotonic(), 0
        saved = told = started
        for part in stack.enter_context(closing(loop.steps())):
            num_samples += part.num_global
            done, epoch_ends = loop.step == course.num_steps, loop.step % course.save_every == 0
            if done or loop.step % course.log_every == 0:
                _report(loop, folder, listener, started)
                told = time.monotonic()
            elif listener is not None and time.monotonic() - told > TELL_EVERY_S:
                listener(_progress(loop, loop.meter.losses(), started))
                told = time.monotonic()
            now = time.monotonic()
            over, old = now - started > course.max_s, now - saved > course.save_every_s
            number, late, due = ranks.most(stop.signal or 0, over, old)
            if done or epoch_ends or number or late or due:
                _save(loop, settings, folder, loop.step // course.save_every if epoch_ends else None)
                saved = time.monotonic()
            if number and not done:
                stop.request(number)  # which another rank was sent
                stop.raise_if_requested(f"step {loop.step} of {course.num_steps}", f"{settings.last} is saved")
            if late:
                break
        result = _result(loop, settings, folder, resumed, time.monotonic() - started, num_samples)
        return replace(result, notes=notes)


class Loop(Generic[P]):
    """The steps of one trainer on one rank, and the numbers that go with them."""

    def __init__(self, trainer: Trainer[P], ranks: Ranks = ALONE) -> None:
        self.trainer, self.ranks = trainer, ranks
        self.step = 0
        """Taken so far."""
        self.grad_norm = 0.0
        """Of the last step whose gradient was finite, before clipping."""
        self.meter = Meter(trainer.watch)
        scaled = trainer.course.precision == torch.float16
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=scaled)

    def checkpoint(self, settings: RunSettings) -> CheckpointIO:
        """All that the run needs to go on, and what it is of."""
        config = settings.config.model_dump(mode="json")
        own = {"config": config, "step": self.step, "optimizer": self.trainer.optimizer, "scaler": self.scaler}
        return CheckpointIO(settings.kind, **own, **settings.identity, **self.trainer.named())

    def steps(self) -> Generator[P, None, None]:
        """Take the optimiser steps that are left; yields the last part's batch after each.

        Raises: DivergedError naming the samples when a loss or a gradient is not finite; DeviceMemoryError.
        """
        parts: list[tuple[P, Tensor]] = []
        for part in self.trainer.batches(self.step):
            if not parts:
                torch.manual_seed(step_seed(self.trainer.course.seed, self.step, self.ranks.rank))
            with self._room(part), self.trainer.watch.time("model"):
                parts.append((part, self._accumulate(part)))
                if part.last:
                    self._clip_and_check(parts)
            if part.last:
                with self._room(part), self.trainer.watch.time("optimiser"):
                    self._update(part)
                parts = []
                yield part

    def _room(self, part: P) -> AbstractContextManager[None]:
        what, course = f"step {self.step + 1}", self.trainer.course
        return saying_what_to_lower(what, str(self.trainer.device), len(part.keys), course.smaller)

    def _accumulate(self, part: P) -> Tensor:
        """Add the gradients of a part of a global batch, weighted by its share of the samples; its loss, on the device.

        The sum over parts and ranks is the gradient of the global batch; the mean that ranks take of it is undone here.
        """
        with self.ranks.part(self.trainer.network, part.last):
            losses = self.trainer.losses(part)
            loss = losses["loss"]
            self.scaler.scale(loss * (part.weight * self.ranks.size)).backward()  # type: ignore[no-untyped-call]
        self.meter.add(losses, part.weight)
        return loss.detach()

    def _clip_and_check(self, parts: list[tuple[P, Tensor]]) -> None:
        """Clip the gradient; then the step's one wait for the device: losses of all parts and the gradient's norm."""
        self.scaler.unscale_(self.trainer.optimizer)
        limit = clip_limit(self.trainer.optimizer, self.trainer.course.clip_grad)
        norm = torch.nn.utils.clip_grad_norm_(self.trainer.network.parameters(), limit)
        *losses, length = torch.stack([*(loss for _, loss in parts), norm]).tolist()
        bad = [(part, loss) for (part, _), loss in zip(parts, losses, strict=True) if not math.isfinite(loss)]
        if math.isfinite(length) and not bad:
            self.grad_norm = length
            return
        if self.scaler.get_scale() > 1 and not self.ranks.most(len(bad))[0]:
            return  # float16 overflowed; the scale is lowered and the step left out
        raise self._diverged([part for part, _ in parts], length, *bad[:1])

    def _diverged(self, parts: list[P], length: float, bad: tuple[P, float] | None = None) -> DivergedError:
        """The same error on all ranks: of one whose loss it is, before those that got its gradients."""
        keys = bad[0].keys if bad else [key for part in parts for key in part.keys]
        what = f"the loss is {bad[1]}" if bad else f"the gradient's norm is {length}"
        answers = self.ranks.gather((bad is None, what, keys))
        _, what, keys = min(answers, key=lambda answer: answer[0])
        named = ", ".join(keys[:_NUM_KEYS_SHOWN])
        more = f" and {len(keys) - _NUM_KEYS_SHOWN} more" if len(keys) > _NUM_KEYS_SHOWN else ""
        return DivergedError(
            f"{what} in step {self.step + 1}, in a batch of {named}{more}; last.pt holds an earlier step: "
            f"{self.trainer.course.remedy}"
        )

    def _update(self, part: P) -> None:
        """Step the optimiser with the gradients gathered since the last one."""
        trainer = self.trainer
        set_learning_rate(trainer.optimizer, trainer.learning_rate(self.step))
        self.scaler.step(trainer.optimizer)
        self.scaler.update()
        trainer.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        trainer.updated(self.step)
        self.meter.count_step(part.num_global)


def _resume(loop: Loop[P], settings: RunSettings, folder: RunFolder | None) -> tuple[str, ...]:
    """Take up the newest whole checkpoint, which the first rank alone reads and checks, and sends to the others.

    Returns what there is to say of a folder that was damaged, which is logged too.
    """
    newest = loop.ranks.first(lambda: newest_checkpoint(settings.last, settings.kind))
    if newest is not None:
        _refuse_other_run(newest, settings)
        loop.checkpoint(settings).restore(newest.state, str(newest.path))
        loop.step = newest.state["step"]
    return loop.ranks.first(lambda: _take_up(loop, settings, folder, newest) if folder else ())


def _refuse_other_run(newest: Newest, settings: RunSettings) -> None:
    """See that a checkpoint is of this run, whatever else the folder says."""
    path, state = newest.path, newest.state
    refuse_other(f"{path} was", {name: state.get(name) for name in settings.identity}, settings.identity)
    if "config" in state:
        changes = changed_fields(state["config"], settings.config, settings.kind)
        remedy = "restore this run's, or choose another --out"
        refuse_differences(f"{path} is of a run with other settings", changes, remedy)


def _take_up(loop: Loop[P], settings: RunSettings, folder: RunFolder, newest: Newest | None) -> tuple[str, ...]:
    replaced = take_up(newest, settings.last) if newest is not None else None
    torn = folder.take_up(loop.step, loop.trainer.course.tracking)
    notes = tuple(note for note in (replaced, torn) if note is not None)
    for note in notes:
        _log.warning(note)
    return notes


def _report(loop: Loop[P], folder: RunFolder | None, on_progress: OnTrainProgress | None, started: float) -> None:
    losses = loop.meter.losses(loop.ranks)
    progress = None if folder is None else _progress(loop, losses, started)
    loop.meter = Meter(loop.trainer.watch)
    if folder is None or progress is None:
        return
    folder.log(progress.record())
    if on_progress is not None:
        on_progress(progress)


def _progress(loop: Loop[P], losses: dict[str, float], started: float) -> TrainProgress:
    """What there is to say of the steps since the last line; `losses` their means."""
    course, meter = loop.trainer.course, loop.meter
    seconds = meter.seconds()
    spent, spent_on = sum(seconds.values()), shares(seconds)
    remaining_s, limit_step = _time_left(loop, spent / meter.num_steps, time.monotonic() - started)
    return TrainProgress(
        step=loop.step,
        num_steps=course.num_steps,
        epoch=math.ceil(loop.step / course.steps_per_epoch),
        num_epochs=course.num_epochs,
        lr=loop.trainer.optimizer.param_groups[0]["lr"],
        grad_norm=loop.grad_norm,
        losses=dict(course.logged(losses)),
        throughput_img_s=meter.num_images / spent,
        remaining_s=remaining_s,
        shares=spent_on,
        advice=course.advice(spent_on) if meter.num_steps >= _TELLING_STEPS else None,
        limit_step=limit_step,
    )


def _time_left(loop: Loop[P], step_s: float, elapsed_s: float) -> tuple[float, int | None]:
    """Seconds to the end of the run, or to its time limit, and the step that this is at."""
    course = loop.trainer.course
    to_end_s, to_limit_s = (course.num_steps - loop.step) * step_s, max(0.0, course.max_s - elapsed_s)
    if to_limit_s >= to_end_s:
        return to_end_s, None
    return to_limit_s, min(course.num_steps, loop.step + math.ceil(to_limit_s / step_s))


def _save(loop: Loop[P], settings: RunSettings, folder: RunFolder | None, epoch: int | None) -> None:
    with loop.trainer.watch.time("save"):
        loop.ranks.first(
            lambda: folder.save(loop.checkpoint(settings), epoch, loop.trainer.course.num_kept) if folder else None
        )


def _result(
    loop: Loop[P], settings: RunSettings, folder: RunFolder | None, resumed: int, seconds: float, num_samples: int
) -> RunResult:
    lines = loop.ranks.first(lambda: read_metrics(folder.path)[-1:] if folder else [])
    return RunResult(
        run_dir=settings.out,
        checkpoint=settings.last,
        step=loop.step,
        num_steps=loop.trainer.course.num_steps,
        num_epochs=loop.trainer.course.num_epochs,
        num_samples=loop.trainer.course.epoch_size,
        resumed_step=resumed,
        losses=losses_of(lines[0]) if lines else {},
        seconds=seconds,
        throughput_img_s=num_samples / seconds,
        shares=shares(loop.trainer.watch.seconds()),
        rank=loop.ranks.rank,
        num_ranks=loop.ranks.size,
    )
