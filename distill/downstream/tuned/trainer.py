"""One training of a backbone with a head on labels, as the engine takes it.

Where it starts (a distilled student, random weights, another checkpoint), what its task is and on which images is given
by the job; the engine resumes, logs, saves and stops it. Two processes take the steps of one, but for what each draws
or measures on its own images: batch norms (`sync_bn` makes them one), dropout, stochastic depth and mixup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.base import TaskNetwork, TunedTask
from dtpipe.distill.downstream.tuned.batches import BatchOrder, TuneBatch, ViewPart
from dtpipe.distill.downstream.tuned.config import TuneConfig, TunedRecipe
from dtpipe.distill.downstream.tuned.examples import TrainingViews, View, fit_targets, read_ahead, seeded_generators
from dtpipe.distill.downstream.tuned.groups import task_optimizer
from dtpipe.distill.downstream.tuned.heads.distilled import (
    DistilledDecoder,
    reading_as_distilled,
    start_note,
    take_decoder,
)
from dtpipe.distill.downstream.tuned.network import (
    build_tuned,
    check_parts,
    classes_to_dict,
    freeze_idle,
    measure_untouched,
    resolve,
    to_device,
    weights_fingerprint,
)
from dtpipe.distill.downstream.tuned.reads import FROM_DECODER
from dtpipe.distill.downstream.tuned.schedule import rate_share
from dtpipe.distill.engine.device import autocast, pick_precision
from dtpipe.distill.engine.ranks import ALONE, Ranks
from dtpipe.distill.engine.run_folder import RunSettings
from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.engine.trainer import Course
from dtpipe.distill.student.student import Student, spec_to_dict

TUNED_KIND = "eval"
"""Of the checkpoints and folders of tuned tasks: they follow from this section of the settings."""
MEASURED_VIEWS = 64
"""From which norms that stay as they are get their statistics, where they have none."""
REMEDY = "train anew in another --out with a lower eval.tune.lr, a longer eval.tune.warmup or eval.tune.clip_grad"
_SMALLER = "train anew in another --out with eval.tune.micro_batch, which takes each batch in smaller passes"


@dataclass(frozen=True)
class TuneJob:
    """What to train, from where, on which images."""

    task: TunedTask[Any]
    student: Student
    """Its weights are where the training starts; it is copied."""
    labelled: LabelledSet
    config: TuneConfig
    seed: int = 0
    """Of the head's weights, order, augmentation and dropout."""
    decoder: DistilledDecoder | None = None
    """Where a head of masks or classes starts; None: from weights of the seed."""

    def started_from(self, read_decoder: Callable[[], DistilledDecoder | None]) -> tuple[TuneJob, str | None]:
        """The job with its head's start where task and settings allow, and a clause on it, or why it starts anew."""
        asks = FROM_DECODER in self.task.reads and self.config.from_decoder
        if not asks or (decoder := read_decoder()) is None:
            return self, None
        classes = fit_targets(self.task, self.labelled).classes
        if (why := decoder.misfit(self.task, self.config.head, classes)) is not None:
            return self, f"starts from the backbone alone: {why}"
        config = reading_as_distilled(self.config, decoder)
        return replace(self, decoder=decoder, config=config), start_note(decoder, classes)

    @property
    def resolved(self) -> TuneConfig:
        """The settings as task and student take them."""
        return resolve(self.task, self.student, self.config)

    def record(self) -> dict[str, Any]:
        """What the training is of, by content, as plain values."""
        start = {} if self.decoder is None else {"start_decoder": self.decoder.digest}
        return {
            **start,
            "task": self.task.name,
            "student": spec_to_dict(self.student.spec),
            "start": weights_fingerprint(self.student),
            "images": self.labelled.content_digest(),
            "num_images": len(self.labelled),
            "seed": self.seed,
        }

    def settings(self, folder: Path) -> RunSettings:
        """The training as its folder knows it."""
        record = self.record()
        return RunSettings(folder, TUNED_KIND, TunedRecipe(tune=self.config), identity={"of": record}, data=record)


class Tuning:
    """Network, optimiser and batches of one job, and the losses of a batch."""

    def __init__(self, job: TuneJob, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.job, self.device, self.ranks = job, device, ranks
        self.config = job.resolved
        self.labelled = fit_targets(job.task, job.labelled)
        self.classes = self.labelled.classes
        self.order = BatchOrder.of(self.config, len(self.labelled), job.seed)
        self.views = TrainingViews(self.labelled, job.task.augment(self.classes, self.config), job.seed)
        self.mix = job.task.mix(self.classes, self.config)
        self.model = build_tuned(job.task, job.student, self.classes, self.config, ranks, device)
        if job.decoder is not None:
            take_decoder(self.model, job.decoder, self.classes)
        check_parts(self.model, self.order, ranks)
        some = (self.views[View(row, 0)] for row in range(min(len(self.labelled), MEASURED_VIEWS)))
        measure_untouched(self.model, some, device)
        if ranks.size > 1:
            views = self.order.parts(0, ALONE)[0].views[:2]
            freeze_idle(self.model, [self.views[view] for view in views], device)
        self.network = ranks.wrap(self.model, device)
        decay = self.config.ema_decay
        self.ema = ModelEmaV3(self.model, decay=decay, use_warmup=True) if decay else None
        self.optimizer = task_optimizer(cast(TaskNetwork, self.model), self.config, device)
        self.watch = Stopwatch(device)
        self.course = _course(self.config, self.order, len(self.labelled), device)

    @property
    def scored(self) -> nn.Module:
        """The network to score: the average of the weights, where one is kept."""
        module: nn.Module = self.model if self.ema is None else self.ema.module
        return module

    def batches(self, step: int) -> Iterator[TuneBatch]:
        """This rank's parts of the batches from a step on."""

        def views() -> Iterator[tuple[View, ...]]:
            return (part.views for part in self._parts(step))

        read = read_ahead(self.views, views, self.config.run)
        for part, examples in zip(self._parts(step), read, strict=True):
            images = [example.image.to(self.device) for example in examples]
            targets = [to_device(example.target, self.device) for example in examples]
            keys = tuple(self.labelled.keys[view.row] for view in part.views)
            yield TuneBatch(images, targets, keys, self.order.batch_size, part)

    def _parts(self, step: int) -> Iterator[ViewPart]:
        for at in range(step, self.order.num_steps):
            yield from self.order.parts(at, self.ranks)

    def losses(self, batch: TuneBatch) -> Mapping[str, Tensor]:
        """The task's own."""
        images, targets = batch.images, batch.targets
        if self.mix is not None:
            with seeded_generators(self.job.seed, "mix", batch.part.step, batch.part.idx, self.ranks.rank):
                mixed, targets = self.mix(torch.stack(list(images)), targets)
                images = list(mixed)
        with autocast(self.course.precision, self.device):
            losses: Mapping[str, Tensor] = self.network(images, targets)
        return losses

    def learning_rate(self, step: int) -> float:
        """Warm-up, then the schedule."""
        return self.config.lr * rate_share(step, self.course.num_steps, self.config)

    def updated(self, step: int) -> None:
        """Move the average."""
        if self.ema is not None:
            self.ema.update(self.model, step)

    def named(self) -> Mapping[str, Any]:
        """What a checkpoint holds."""
        return {
            "task": self.job.task.name,
            "student_spec": spec_to_dict(self.job.student.spec),
            "classes": classes_to_dict(self.classes),
            "network": self.model,
            "ema": self.ema.module if self.ema is not None else None,
        }


def _course(config: TuneConfig, order: BatchOrder, num_images: int, device: torch.device) -> Course:
    return Course(
        num_steps=order.num_steps,
        steps_per_epoch=num_images / order.batch_size,
        epoch_size=num_images,
        seed=order.seed,
        precision=pick_precision(config.precision, device),
        clip_grad=config.clip_grad,
        log_every=config.run.log_every,
        save_every=config.run.save_every,
        save_every_s=config.run.save_every_s,
        tracking=config.run,
        remedy=REMEDY,
        smaller=_SMALLER,
    )
