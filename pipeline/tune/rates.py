"""The learning rate of an arm, chosen on folds of its labelled images alone; held-out images are never looked at.

Each fold is a training of its own in a folder, so a choice that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.downstream.frozen.probe import stratified_folds
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.run import TuneResult
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.distill.engine.checkpoint import drop_previous
from dtpipe.manifests.errors import DivergedError, LockHeldError
from dtpipe.manifests.labels import Class

Train = Callable[[TuneJob, LabelledSet, Path, str], TuneResult]
"""Trains a job in a folder and scores it on images; the last is what to say of it meanwhile."""


@dataclass(frozen=True)
class RateChoice:
    """A rate, and how it was come by."""

    lr: float
    selection: float | None = None
    """Mean score over the folds; None where nothing was chosen."""
    tried: tuple[tuple[float, float | None], ...] = ()
    """Each rate with its mean score, None where its loss was not finite."""

    def next_best(self) -> RateChoice | None:
        """The choice without this rate, whose loss turned out not to be finite; None where none is left."""
        tried = tuple((lr, None if lr == self.lr else value) for lr, value in self.tried)
        return None if all(value is None for _, value in tried) else _best(tried)


def choose_rate(job: TuneJob, folder: Path, train: Train) -> RateChoice:
    """The rate of the grid with the best mean over folds; ties go to the earlier one.

    Without a grid, or with too few images for two folds of every class, it is the `lr` of the settings. A fold in which
    nothing counts, such as images without objects, is learned from and has no score.

    Raises: LockHeldError where another process is at some of the trainings, once all others are done.
    """
    grid, folds = job.config.lr_grid, fold_numbers(job.labelled, job.config.folds)
    if len(grid) == 1:
        return RateChoice(grid[0])
    if not grid or folds is None or not (scored := _scored_folds(job.labelled, folds)):
        return RateChoice(job.config.lr)
    tried: list[tuple[float, float | None]] = []
    held: list[LockHeldError] = []
    for lr in grid:
        with _later(held):
            tried.append((lr, _score_rate(job, lr, folds, scored, folder, train)))
    if held:
        raise held[0]
    return _best(tuple(tried))


@contextmanager
def _later(held: list[LockHeldError]) -> Iterator[None]:
    """A training that another process is at is left for when all others are done."""
    try:
        yield
    except LockHeldError as err:
        held.append(err)


def _best(tried: tuple[tuple[float, float | None], ...]) -> RateChoice:
    lr, selection = max(tried, key=lambda entry: -np.inf if entry[1] is None else entry[1])
    return RateChoice(lr, selection, tried)


def fold_numbers(labelled: LabelledSet, num_folds: int) -> NDArray[np.int64] | None:
    """The fold of each image, classes of images spread evenly; None where there are too few for two folds."""
    if labelled.kind is Class:
        return stratified_folds(labelled.read_classes(), num_folds)
    num_folds = min(num_folds, len(labelled))
    return None if num_folds < 2 else np.arange(len(labelled)) % num_folds


def _scored_folds(labelled: LabelledSet, folds: NDArray[np.int64]) -> list[int]:
    """The folds with something that counts."""
    parts = (labelled.subset(np.flatnonzero(folds == fold)) for fold in range(int(folds.max()) + 1))
    return [fold for fold, part in enumerate(parts) if part.find_some_classes(1)]


def _score_rate(
    job: TuneJob, lr: float, folds: NDArray[np.int64], scored: list[int], folder: Path, train: Train
) -> float | None:
    """Mean score of a rate over folds; None when a loss is not finite, which is a rate too high."""
    values: list[float] = []
    held: list[LockHeldError] = []
    for fold in scored:
        learned, left = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        run = job.config.run.model_copy(update={"keep_predictions": False, "trackers": (), "tensorboard": False})
        config = with_rate(job, lr).config.model_copy(update={"run": run})
        own = replace(job, labelled=job.labelled.subset(learned), config=config)
        place = folder / f"lr{lr:g}-fold{fold}"
        try:
            with _later(held):
                values.append(train(own, job.labelled.subset(left), place, f"lr {lr:g}, fold {fold + 1}").value)
                drop_previous(place / "last.pt")
                (place / "last.pt").unlink(missing_ok=True)  # its score is all that is needed of it
        except DivergedError:
            return None
    if held:
        raise held[0]
    return float(np.mean(values))


def with_rate(job: TuneJob, lr: float) -> TuneJob:
    """The job at one rate; how that was chosen is no part of what it is."""
    fields = TuneConfig.model_fields
    chosen = {name: fields[name].default for name in ("lr_grid", "folds", "lr_choice")}
    return replace(job, config=job.config.model_copy(update={"lr": lr, **chosen}))
