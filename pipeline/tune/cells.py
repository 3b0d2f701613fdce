"""The cells of a table of tuned arms: one training for each arm, number of labelled images and seed.

Each has a folder of its own, named `ARM-NUMBER-SEED`, with the run and its score; finished ones are read, so that the
same command goes on where it was stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtpipe.distill.downstream.labelled import LabelledSet, draw_labelled, join_sets
from dtpipe.distill.downstream.result import HEAD, ProbeResult, Score
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.run import TuneResult
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.manifests.errors import DivergedError
from dtpipe.manifests.labels import Class
from dtpipe.pipeline.arms import Arm
from dtpipe.pipeline.labelled import split_by_key
from dtpipe.pipeline.tune.rates import RateChoice, Train, choose_rate, with_rate

RATES = "rates"
"""Folder of the trainings that chose rates, each in a folder of its cell's name."""


@dataclass(frozen=True)
class TunedCell:
    """One training of a table."""

    place: int
    """Of the arm among the arms."""
    arm: Arm
    seed: int
    labelled: LabelledSet
    test: LabelledSet


@dataclass(frozen=True)
class TunedTable:
    """What a table of tuned arms is of."""

    task: TunedTask[Any]
    arms: Sequence[Arm]
    train: LabelledSet
    test: LabelledSet
    num_labelled: Sequence[int | None]
    seeds: Sequence[int]
    config: TuneConfig
    resplit: bool = False
    """Each seed holds out other images of both sets, as many as `test` has."""

    def sets(self, seed: int) -> tuple[LabelledSet, LabelledSet]:
        """Images to draw labels from and images held out at a seed."""
        if not self.resplit:
            return self.train, self.test
        whole = join_sets(self.train, self.test)
        names = whole.classes.names
        classes = whole.read_classes() if whole.kind is Class else None
        labels = [None] * len(whole) if classes is None else [names[number] for number in classes]
        learned, held_out = split_by_key(whole.keys, labels, len(self.test) / len(whole), seed)
        return whole.subset(learned), whole.subset(held_out)

    def cells(self) -> Iterator[TunedCell]:
        """All arms of a draw before the next draw; each number of labelled images once."""
        for num in dict.fromkeys(len(self.train) if num is None else num for num in self.num_labelled):
            for seed in self.seeds:
                train, test = self.sets(seed)
                rows = draw_labelled(train, None if num == len(self.train) else num, seed)
                for place, arm in enumerate(self.arms):
                    yield TunedCell(place, arm, seed, train.subset(rows), test)


def run_cells(table: TunedTable, out: Path, train: Train, note: Callable[[str], None]) -> ProbeResult:
    """Train and score every cell. Each seed draws other labelled images, the same ones for every arm.

    Raises: as `distill.downstream.tuned.run.tune`.
    """
    chosen: dict[tuple[str, int], RateChoice] = {}
    scores, said = [], []
    folders = folder_names([arm.name for arm in table.arms])
    for cell in table.cells():
        arm, num, seed = cell.arm, len(cell.labelled), cell.seed
        begun = TuneJob(table.task, arm.student_for(seed), cell.labelled, table.config, seed)
        job, start = begun.started_from(arm.decoder_for(seed))
        said += [f"{arm.name} {start}"] if start else []
        folder = out / f"{folders[cell.place]}-{num}-{seed}"
        named = f"{table.task.name}: {arm.name}, {num} labelled, seed {seed}"
        choice = chosen.get((arm.name, num)) if table.config.lr_choice == "first_seed" else None
        if choice is None:
            choice = choose_rate(job, out / RATES / folder.name, _named(train, named))
            chosen[arm.name, num] = choice
        choice, result, folder = _train(job, choice, cell.test, folder, _named(train, named), note)
        scores.append(_score(cell, choice, result, folder))
        note(f"{named}: {table.task.metric_name} {result.value:.3f} at lr {choice.lr:g}")
        said += rate_notes(arm.name, num, table.config, choice)
    notes = tuple(dict.fromkeys(said))
    return ProbeResult(table.task.name, table.task.metric_name, len(table.test), tuple(scores), notes, headline(table))


def _train(
    job: TuneJob, choice: RateChoice, test: LabelledSet, folder: Path, train: Train, note: Callable[[str], None]
) -> tuple[RateChoice, TuneResult, Path]:
    """A cell's training at the rate chosen, or at the next best where the folds did not show that it is too high."""
    beside = folder
    while True:
        try:
            return choice, train(with_rate(job, choice.lr), test, beside, f"lr {choice.lr:g}"), beside
        except DivergedError as err:
            other = choice.next_best()
            if other is None:
                raise
            note(f"{folder.name}, lr {choice.lr:g}: {err}; now lr {other.lr:g}, the next best on the folds")
            choice, beside = other, folder.with_name(f"{folder.name}-lr{other.lr:g}")


def _named(train: Train, named: str) -> Train:
    return lambda job, test, folder, what: train(job, test, folder, f"{named}, {what}")


def _score(cell: TunedCell, choice: RateChoice, result: TuneResult, folder: Path) -> Score:
    settings = {"lr": choice.lr, "steps": result.num_steps, "folder": folder.name}
    if choice.tried:
        settings["rates"] = {f"{lr:g}": value for lr, value in choice.tried}
    return Score(
        cell.arm.name,
        HEAD,
        len(cell.labelled),
        cell.seed,
        result.value,
        choice.selection,
        best=True,
        settings=settings,
        others=dict(result.others),
        by_class={name: dict(values) for name, values in result.by_class.items()},
    )


def rate_notes(arm: str, num: int, config: TuneConfig, choice: RateChoice) -> list[str]:
    """What to say of a choice that says little: too few images, or an end of the grid."""
    if len(config.lr_grid) < 2:
        return []
    if not choice.tried:
        return [f"{num} labelled images are too few to choose a rate from; there it is {config.lr:g}"]
    values = [value for _, value in choice.tried]
    if values.count(values[0]) == len(values):
        return [f"{arm}, {num} labelled: all rates score the same on the folds; the first was taken"]
    if choice.lr in (min(config.lr_grid), max(config.lr_grid)):
        return [f"{arm}, {num} labelled: the best rate, {choice.lr:g}, is at an end of the grid; a wider one is fairer"]
    return []


def headline(table: TunedTable) -> str:
    """How the arms were trained, in a clause."""
    grid = ", ".join(f"{lr:g}" for lr in table.config.lr_grid)
    rate = (
        f"each at its best rate of {grid} on folds of its labelled images" if grid else f"at rate {table.config.lr:g}"
    )
    length = f"{table.config.steps} steps" if table.config.steps else f"{table.config.epochs} epochs"
    split = "; each seed holds out other images" if table.resplit else ""
    return f"every arm is trained on the same labels for {length}, {rate}{split}"


def folder_names(names: Sequence[str]) -> list[str]:
    """A folder's name for each arm: what disks take, and no two alike."""
    plain = [re.sub(r"[^\w.+]+", "-", name).strip("-.") or "arm" for name in names]
    return [name if plain.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(plain)]
