"""The cells of a table of tuned arms: one training for each arm, number of labelled images and seed.

Each has a folder of its own, named `ARM-NUMBER-SEED`, with the run and its score; finished ones are read, so that the
same command goes on where it was stopped, and several share the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtpipe.distill.downstream.kept import folder_names
from dtpipe.distill.downstream.labelled import LabelledSet, draw_labelled, join_sets
from dtpipe.distill.downstream.result import HEAD, ProbeResult, Score
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.run import TuneResult
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.manifests.errors import DivergedError, LockHeldError
from dtpipe.manifests.labels import Class
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.arms import Arm
from dtpipe.pipeline.labelled import split_by_key
from dtpipe.pipeline.tune.rates import RateChoice, Train, choose_rate, with_rate

RATES = "rates"
"""Folder of the trainings that chose rates, each in a folder of its cell's name."""
_POLL_S = 2.0


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
    rates: Mapping[tuple[str, int], RateChoice] = field(default_factory=dict)
    """Chosen already, by name of the arm and number of labelled images."""
    earlier: ProbeResult | None = None
    """What these seeds are added to."""

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

    Several processes may do this at once in one folder: each takes trainings that no other is at, and all end with
    the whole table.

    Raises: as `distill.downstream.tuned.run.tune`, but for LockHeldError.
    """
    cells = list(table.cells())
    runner = _Runner(table, cells, out, train, note)
    done: dict[int, _Finished] = {}
    waited = False
    while left := [place for place in range(len(cells)) if place not in done]:
        num_chosen = len(runner.choices)
        for place in left:
            with suppress(LockHeldError):  # another process is at it
                done[place] = runner.run(cells[place])
        if len(left) == len(cells) - len(done) and num_chosen == len(runner.choices):
            if not waited:
                note(f"{count_of(len(left), 'training')} of this table are in the hands of other processes: waiting")
            waited = True
            time.sleep(_POLL_S)
    finished = [done[place] for place in range(len(cells))]
    notes = tuple(dict.fromkeys(note for each in finished for note in each.notes))
    scores = tuple(each.score for each in finished)
    return ProbeResult(table.task.name, table.task.metric_name, len(table.test), scores, notes, headline(table))


@dataclass(frozen=True)
class _Finished:
    score: Score
    notes: tuple[str, ...]


class _Runner:
    """Trains cells, and keeps the rates that were chosen for them."""

    def __init__(
        self, table: TunedTable, cells: Sequence[TunedCell], out: Path, train: Train, note: Callable[[str], None]
    ) -> None:
        self.table, self.out, self.train, self.note = table, out, train, note
        self.folders = folder_names([arm.name for arm in table.arms])
        self.choices: dict[str, RateChoice] = {}
        """By folder of the cell whose labelled images chose."""
        self._told: set[str] = set()
        self._first: dict[tuple[int, int], TunedCell] = {}
        for cell in cells:
            self._first.setdefault((cell.place, len(cell.labelled)), cell)

    def run(self, cell: TunedCell) -> _Finished:
        """Raises: LockHeldError while another process is at this training, or at one that chooses its rate."""
        job, start = self._job(cell)
        if start and (said := f"{cell.arm.name} {start}") not in self._told:
            self._told.add(said)
            self.note(said)  # before hours are spent
        choice = self._choice(cell, job)
        folder, named = self.out / self._folder(cell), self._named(cell)
        choice, result, folder = _train(job, choice, cell.test, folder, _named(self.train, named), self.note)
        self.note(f"{named}: {self.table.task.metric_name} {result.value:.3f} at lr {choice.lr:g}")
        notes = [f"{cell.arm.name} {start}"] if start else []
        notes += rate_notes(cell.arm.name, len(cell.labelled), self.table.config, choice)
        return _Finished(_score(cell, choice, result, folder), tuple(notes))

    def _choice(self, cell: TunedCell, job: TuneJob) -> RateChoice:
        given = self.table.rates.get((cell.arm.name, len(cell.labelled)))
        if given is not None:
            return given
        by_first = self.table.config.lr_choice == "first_seed"
        chooser = self._first[cell.place, len(cell.labelled)] if by_first else cell
        folder = self._folder(chooser)
        if folder not in self.choices:
            own = job if chooser.seed == cell.seed else self._job(chooser)[0]
            train = _named(self.train, self._named(chooser))
            self.choices[folder] = choose_rate(own, self.out / RATES / folder, train)
        return self.choices[folder]

    def _job(self, cell: TunedCell) -> tuple[TuneJob, str | None]:
        """The training, and what its head starts from, in words."""
        begun = TuneJob(self.table.task, cell.arm.student_for(cell.seed), cell.labelled, self.table.config, cell.seed)
        return begun.started_from(lambda: cell.arm.decoder_for(cell.seed))

    def _folder(self, cell: TunedCell) -> str:
        return f"{self.folders[cell.place]}-{len(cell.labelled)}-{cell.seed}"

    def _named(self, cell: TunedCell) -> str:
        return f"{self.table.task.name}: {cell.arm.name}, {len(cell.labelled)} labelled, seed {cell.seed}"


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
