"""The training of an interpreter on the engine: a run that was killed goes on, bit for bit on a CPU.

Source: section 3.2, equation (4), and appendices D.2 and G.2 of the paper. Its batch size and the rate after the
warm-up (half a cosine) are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtpipe.distill.engine.device import autocast, pick_precision, seeded, training_device
from dtpipe.distill.engine.loop import run
from dtpipe.distill.engine.optim import build_optimizer, warmup_cosine
from dtpipe.distill.engine.progress import OnTrainProgress, RunResult
from dtpipe.distill.engine.run_folder import RunSettings
from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.engine.trainer import Course
from dtpipe.distill.labels.config import InterpreterConfig
from dtpipe.distill.labels.data import InterpreterBatch, LabelledFeatures, batches_of, steps_per_epoch
from dtpipe.distill.labels.interpreter import FeatureInterpreter, InterpreterSpec, LabelKind
from dtpipe.distill.labels.losses import interpreter_losses
from dtpipe.distill.student.blocks import resize
from dtpipe.manifests.labels import Class

INTERPRET = "interpret"
"""The section of settings, and the kind of checkpoints."""


class InterpreterTraining:
    """A `Trainer` of one interpreter in one process."""

    def __init__(self, config: InterpreterConfig, data: LabelledFeatures, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.interpreter = FeatureInterpreter(interpreter_spec(config, data)).to(device).train()
        self.network = self.interpreter
        self.optimizer = build_optimizer(self.network, "adamw", config.lr, config.weight_decay, config.betas)
        self.watch = Stopwatch(device)
        per_epoch = steps_per_epoch(len(data), config.batch_size)
        self.num_warmup = round(config.num_warmup_epochs * per_epoch)
        self.course = Course(
            num_steps=config.epochs * per_epoch,
            steps_per_epoch=per_epoch,
            epoch_size=len(data),
            seed=config.seed,
            precision=pick_precision(config.precision, device),
            clip_grad=config.clip_grad,
            log_every=config.run.log_every,
            save_every=config.run.save_every,
            tracking=config.run,
            remedy="train anew in another --out with a lower interpret.lr",
            smaller="train anew in another --out with a smaller interpret.batch_size",
        )

    def batches(self, step: int) -> Iterator[InterpreterBatch]:
        """As `Trainer.batches`."""
        config = self.config
        for places in batches_of(self.data, config.batch_size, self.course.num_steps, config.seed, step):
            yield places.gather(self.data, self.device)

    def losses(self, batch: InterpreterBatch) -> Mapping[str, Tensor]:
        """Of logits brought to the masks' size, bilinear."""
        with autocast(self.course.precision, self.device):
            logits = self.network(batch.levels)
        logits = logits.flatten(1) if batch.truth.ndim == 1 else resize(logits, batch.truth.shape[-2:])
        return interpreter_losses(logits.float(), batch.truth, self.config.dice_weight)

    def learning_rate(self, step: int) -> float:
        """As `Trainer.learning_rate`."""
        return warmup_cosine(step, self.course.num_steps, self.num_warmup, self.config.lr)

    def updated(self, step: int) -> None:
        """Nothing follows the weights."""

    def named(self) -> Mapping[str, Any]:
        """As `Trainer.named`."""
        return {"interpreter": self.interpreter}


def interpreter_spec(config: InterpreterConfig, data: LabelledFeatures) -> InterpreterSpec:
    """The interpreter that settings ask for on some features and labels."""
    kind: LabelKind = "classes" if data.labelled.kind is Class else "masks"
    return InterpreterSpec(data.levels, data.labelled.classes, kind, data.num_views, config.width, config.dropout)


def train_interpreter(
    config: InterpreterConfig,
    data: LabelledFeatures,
    content: Mapping[str, Any],
    on_progress: OnTrainProgress | None = None,
) -> tuple[FeatureInterpreter, RunResult]:
    """Train, or go on training, in `config.run.out`; the interpreter comes back in eval mode.

    content: what it learns from, by digests, which a run that goes on must find again.
    Raises: as the engine's `run`.
    """
    device = training_device(config.run.device)
    with seeded(config.seed, device):
        trainer = InterpreterTraining(config, data, device)
        result = run(trainer, interpreter_run(config, content), on_progress=on_progress)
    return trainer.interpreter.eval(), result


def interpreter_run(config: InterpreterConfig, content: Mapping[str, Any] | None = None) -> RunSettings:
    """The run as its folder knows it."""
    return RunSettings(Path(config.run.out), INTERPRET, config, data=content)
