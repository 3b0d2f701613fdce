"""The rate of an arm is the best on folds of its labelled images, and nothing else has a say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.run import TuneResult
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.manifests.errors import DivergedError
from dtpipe.manifests.labels import Mask
from dtpipe.pipeline.tune.rates import RateChoice, choose_rate, fold_numbers
from parts.tuning import bright_halves, tune_config, tune_job


class Told:
    """Trains nothing: scores by rate and fold as told, and keeps what it was asked."""

    def __init__(self, values: Mapping[float, list[float | None]]) -> None:
        self.values = {lr: list(folds) for lr, folds in values.items()}
        self.asked: list[tuple[TuneJob, LabelledSet, Path]] = []

    def __call__(self, job: TuneJob, test: LabelledSet, folder: Path, _what: str) -> TuneResult:
        self.asked.append((job, test, folder))
        value = self.values[job.config.lr].pop(0)
        if value is None:
            raise DivergedError("too high")
        return TuneResult(folder, folder / "last.pt", 1, 1, 1, 1, 0, {}, 1.0, 1.0, {}, value=value)


def choose(values: Mapping[float, list[float | None]], num: int = 8, **changes: object) -> tuple[RateChoice, Told]:
    told = Told(values)
    job = tune_job(tune_config(lr_grid=list(values), lr=0.5, folds=2, **changes), bright_halves(num, 0))
    return choose_rate(job, Path("nowhere"), told), told


def test_the_best_mean_over_folds_wins_and_ties_go_to_the_earlier() -> None:
    choice, _ = choose({0.1: [0.2, 0.4], 0.2: [0.9, 0.1], 0.3: [0.5, 0.5]})
    assert choice == RateChoice(0.2, 0.5, ((0.1, pytest.approx(0.3)), (0.2, 0.5), (0.3, 0.5)))


def test_a_rate_whose_loss_is_not_finite_is_not_taken() -> None:
    choice, told = choose({0.1: [0.2, 0.4], 9.0: [0.9, None], 99.0: [None]})
    assert (choice.lr, choice.tried[1:]) == (0.1, ((9.0, None), (99.0, None)))
    assert len(told.asked) == 5


def test_folds_part_the_labelled_images_and_each_is_learned_without() -> None:
    _, told = choose({0.1: [0.0, 0.0], 0.2: [0.0, 0.0]})
    for job, left, _ in told.asked:
        assert not set(job.labelled.keys) & set(left.keys)
        assert len(job.labelled) + len(left) == 8
        assert sorted(np.bincount(left.read_classes())) == [2, 2]
        assert (job.config.lr_grid, job.config.run.keep_predictions) == ((), False)
    assert len({folder for *_, folder in told.asked}) == 4


def test_without_a_grid_or_enough_images_the_settings_rate_is_taken() -> None:
    for choice, told in (choose({}), choose({0.1: [], 0.2: []}, num=2), choose({0.1: []})):
        assert (choice.selection, told.asked) == (None, [])
    assert [choose(values, num=2)[0].lr for values in ({}, {0.1: [], 0.2: []}, {0.1: []})] == [0.5, 0.5, 0.1]


def test_masks_are_folded_by_their_number() -> None:
    numbers = fold_numbers(bright_halves(5, 0, masked=True), 3)
    assert numbers is not None and sorted(np.bincount(numbers)) == [1, 2, 2]
    assert fold_numbers(bright_halves(1, 0, masked=True), 3) is None


def test_a_fold_in_which_nothing_counts_has_no_say() -> None:
    """Every other mask is ignored as a whole, so one of two folds has no score; then all of them."""
    labelled = bright_halves(6, 0, masked=True)
    masks = np.stack([np.full((32, 32), 255, np.uint8), np.zeros((32, 32), np.uint8)])
    for rows, asked in (((0, 1), [1, 1]), ((0, 0), [])):
        blank = replace(labelled, target=lambda row, rows=rows: Mask(masks[rows[row % 2]]))
        told = Told({0.1: [0.2], 0.2: [0.9]})
        job = tune_job(tune_config(lr_grid=[0.1, 0.2], lr=0.5, folds=2), blank, "segment")
        choice = choose_rate(job, Path("nowhere"), told)
        assert [int(folder.name[-1]) for *_, folder in told.asked] == asked
        assert choice.lr == (0.2 if asked else 0.5)
