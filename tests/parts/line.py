"""A third trainer, so that the engine is seen to know nothing of the other two: a line is fitted to rows in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dtpipe.distill.engine.device import seeded
from dtpipe.distill.engine.loop import run
from dtpipe.distill.engine.progress import OnTrainProgress, RunResult
from dtpipe.distill.engine.ranks import ALONE, Ranks, join_ranks
from dtpipe.distill.engine.run_folder import RunSettings
from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.distill.engine.trainer import Course
from dtpipe.manifests.schema import Settings

CPU = torch.device("cpu")
NUM_ROWS = 20
KIND = "line"
AfterStep = Callable[[int], None]


class LineRun(Tracking):
    out: str
    micro_batch: int = 2
    log_every: int = 1
    save_every: int = 4
    num_kept: int = 0
    max_s: float = 1e9
    poisoned: int | None = None
    """A row whose target is not finite."""


class LineConfig(Settings):
    num_steps: int = 12
    batch_size: int = 6
    lr: float = 0.02
    dropout: float = 0.0
    seed: int = 0
    clip_grad: float | None = None
    run: LineRun


@dataclass(frozen=True)
class Rows:
    keys: tuple[str, ...]
    inputs: Tensor
    targets: Tensor
    weight: float
    num_global: int
    last: bool


class Line:
    def __init__(self, config: LineConfig, ranks: Ranks = ALONE, after: AfterStep | None = None) -> None:
        self.config, self.ranks, self.after, self.device = config, ranks, after, CPU
        self.model = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(3, 1))
        self.average = copy.deepcopy(self.model)
        self.network = ranks.wrap(self.model, CPU)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=0.9)
        self.watch = Stopwatch(CPU)
        self.course = Course(
            num_steps=config.num_steps,
            steps_per_epoch=NUM_ROWS / config.batch_size,
            epoch_size=NUM_ROWS,
            seed=config.seed,
            clip_grad=config.clip_grad,
            log_every=config.run.log_every,
            save_every=config.run.save_every,
            num_kept=config.run.num_kept,
            max_s=config.run.max_s,
            advice=lambda _shares: "read faster",
            tracking=config.run,
            remedy="straighten it",
            smaller="widen it",
        )
        rng = np.random.default_rng(7)
        self.inputs = torch.from_numpy(rng.standard_normal((NUM_ROWS, 3), np.float32))
        self.targets = self.inputs @ torch.tensor([1.0, -2.0, 0.5]) + 3
        if config.run.poisoned is not None:
            self.targets[config.run.poisoned] = torch.nan

    def batches(self, step: int) -> Iterator[Rows]:
        size = self.config.batch_size
        for at in range(step, self.config.num_steps):
            drawn = np.random.default_rng([self.config.seed, at]).permutation(NUM_ROWS)[:size]
            share = self.ranks.share(size)
            mine = drawn[share.start : share.stop]
            for start in range(0, len(mine), self.config.run.micro_batch):
                rows = mine[start : start + self.config.run.micro_batch]
                keys = tuple(f"row {row}" for row in rows)
                last = start + self.config.run.micro_batch >= len(mine)
                yield Rows(keys, self.inputs[rows], self.targets[rows], len(rows) / size, size, last)

    def losses(self, rows: Rows) -> dict[str, Tensor]:
        errors = self.network(rows.inputs).flatten() - rows.targets
        return {"loss": errors.square().mean(), "bias": errors.mean()}

    def learning_rate(self, step: int) -> float:
        return self.config.lr * (1 - step / self.config.num_steps)

    def updated(self, step: int) -> None:
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 0.1)
        if self.after is not None:
            self.after(step)

    def named(self) -> Mapping[str, Any]:
        return {"model": self.model, "average": self.average, "rows": NUM_ROWS}


def run_settings(config: LineConfig, **changes: Any) -> RunSettings:
    return RunSettings(Path(config.run.out), KIND, config, **changes)


def fit(
    config: LineConfig, after: AfterStep | None = None, on_progress: OnTrainProgress | None = None, **changes: Any
) -> RunResult:
    """As a command does it: alone, or as one of the ranks that the environment names."""
    with join_ranks("cpu") as ranks, seeded(config.seed, CPU):
        return run(Line(config, ranks, after), run_settings(config, **changes), ranks, on_progress)
