"""Results of `dtpipe eval` as the page needs them, read from the files that lie in a run's eval folder.

Files of every version are read: what one does not have, the page goes without.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dtpipe.distill.downstream.kept import PREDICTED
from dtpipe.distill.downstream.paired import PairedDifference, half_interval
from dtpipe.distill.downstream.result import FIXED, HEAD
from dtpipe.manifests.documents import Refusal
from dtpipe.manifests.errors import DamagedDataError, DtpipeError
from dtpipe.manifests.records.document import read_document
from dtpipe.pipeline.report.section import LeaveOut

_REFUSAL = Refusal(DamagedDataError, "run `dtpipe eval` again")
_BY_CLASS = "_by_class"
OURS = "distilled"
"""The subject of results that name none."""

ByClass = Mapping[str, float | None]
"""Value by name of class; None where it does not occur."""


@dataclass(frozen=True)
class Cell:
    """Scores of one arm from one number of labelled images."""

    by_seed: Mapping[int, float]

    @property
    def values(self) -> tuple[float, ...]:
        """In the order of the seeds."""
        return tuple(self.by_seed.values())

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def interval(self) -> tuple[float, float] | None:
        """Where the mean over all seeds lies as `half_interval` has it; None for one seed."""
        if self.std is None:
            return None
        half = half_interval(self.values)
        return self.mean - half, self.mean + half


Arms = Mapping[str, Mapping[int, Cell]]
"""Arm to number of labelled images to its scores."""


@dataclass(frozen=True)
class TaskResult:
    """One file of results."""

    path: Path
    task: str
    metric: str
    num_test: int
    arms: Arms
    verdicts: tuple[str, ...] = ()
    differences: tuple[PairedDifference, ...] = ()
    notes: tuple[str, ...] = ()
    headline: str = ""
    """What was scored of each arm: a clause."""
    subjects: tuple[str, ...] = (OURS,)
    """The arm that is asked about first; on a page of several runs, that of each."""
    others: Mapping[str, Arms] = field(default_factory=dict)
    """Other scores of the same predictions, by name."""
    chosen: Arms = field(default_factory=dict)
    """The best level of each arm, chosen on labelled images, where that is not the headline."""
    by_class: Mapping[str, Mapping[str, Mapping[int, ByClass]]] = field(default_factory=dict)
    """Name of score to arm to number of labelled images to means over the seeds."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Of each arm the training or draw whose predictions are shown: from the largest number of labelled images, by the
    first seed whose predictions are here."""
    frozen: bool = True
    """False where networks are scored by their own output, not by a classifier on their features."""
    document: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """Of labelled images, ascending."""
        return sorted({num for cells in self.arms.values() for num in cells})

    @property
    def num_seeds(self) -> int:
        """Of the cell that has most."""
        return max(len(cell.values) for cells in self.arms.values() for cell in cells.values())


def task_results(run: Path, leave_out: LeaveOut) -> list[TaskResult]:
    """One per file in the run's eval folder that holds a result; for others `leave_out` says why not."""
    results = []
    for path in sorted((run / "eval").glob("*.json")):
        try:
            results.append(read_result(path))
        except DtpipeError as err:
            leave_out("scores", err)
    return results


def read_result(path: Path) -> TaskResult:
    """What a file of `dtpipe eval` says. Raises: DamagedDataError for another kind of file."""
    document = read_document(path, _REFUSAL.advice)
    try:
        return _parsed(path, document)
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise _REFUSAL.of(path, f"is no result of an evaluation ({type(err).__name__}: {err})") from err


def _parsed(path: Path, document: Mapping[str, Any]) -> TaskResult:
    scores = document["scores"]
    top = _headline(scores)
    others = dict.fromkeys(name for score in top for name in score.get("others") or {})
    arms = _arms(top, "value")
    if not arms:
        raise ValueError("it holds no scores")
    frozen = any(score["level"] != HEAD for score in top)
    fixed = any(score["level"] == FIXED for score in top)
    return TaskResult(
        path,
        str(document["task"]),
        str(document["metric"]),
        int(document["num_test"]),
        arms,
        _sentences(document.get("verdict")),
        tuple(_differences(document.get("differences") or ())),
        _sentences(document.get("notes")),
        str(document.get("headline") or ""),
        (str(document.get("subject") or OURS),),
        {name: _arms(top, name) for name in others},
        _arms([score for score in scores if score["best"]], "value") if fixed else {},
        _by_class(top, document),
        _folders(path, top),
        frozen,
        document,
    )


def _headline(scores: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each arm the fixed candidate or its own head, else the best level: as the table of `dtpipe eval` has it."""
    chosen = []
    for arm in dict.fromkeys(str(score["extractor"]) for score in scores):
        own = [score for score in scores if score["extractor"] == arm]
        levels = {score["level"] for score in own}
        level = next((level for level in (FIXED, HEAD) if level in levels), None)
        chosen += [score for score in own if (score["best"] if level is None else score["level"] == level)]
    return chosen


def _arms(scores: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[int, Cell]]:
    """One value of each score that has it. Raises: ValueError for one that is no number."""
    arms: dict[str, dict[int, Cell]] = {}
    for arm, num, members in _grouped(scores):
        values = {int(one["seed"]): float(value) for one in members if (value := _value(one, name)) is not None}
        if not all(map(math.isfinite, values.values())):
            raise ValueError(f"a score of {arm} is {values}")
        if values:
            arms.setdefault(arm, {})[num] = Cell(values)
    return arms


def _value(score: Mapping[str, Any], name: str) -> Any:
    return score["value"] if name == "value" else (score.get("others") or {}).get(name)


def _differences(entries: Iterable[Mapping[str, Any]]) -> Iterator[PairedDifference]:
    names = [part.name for part in fields(PairedDifference)]
    for entry in entries:
        yield PairedDifference(**{name: entry[name] for name in names})


def _grouped(scores: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, list[Mapping[str, Any]]]]:
    """Arm, number of labelled images, its scores by seed; in the order of the file."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for score in scores:
        groups.setdefault((str(score["extractor"]), int(score["num_labelled"])), []).append(score)
    for (arm, num), members in groups.items():
        yield arm, num, sorted(members, key=lambda score: int(score["seed"]))


def _folders(path: Path, scores: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """Seeds that another machine trained may have left their predictions there."""
    folders: dict[str, Path] = {}
    largest = max(int(score["num_labelled"]) for score in scores)
    for arm, num, members in _grouped(scores):
        names = [(score.get("settings") or {}).get("folder") for score in members]
        own = [path.with_suffix("") / name for name in names if isinstance(name, str)]
        if num == largest and own:
            folders[arm] = next((folder for folder in own if (folder / PREDICTED).is_dir()), own[0])
    return folders


def _sentences(value: object) -> tuple[str, ...]:
    several = value if isinstance(value, list) else [value]
    return tuple(sentence for sentence in several if isinstance(sentence, str) and sentence)


def _by_class(
    scores: Sequence[Mapping[str, Any]], document: Mapping[str, Any]
) -> dict[str, dict[str, dict[int, ByClass]]]:
    names = document.get("classes")
    tables: dict[str, dict[str, dict[int, ByClass]]] = {}
    for arm, num, members in _grouped(scores):
        each = [_class_tables(score, names) for score in members]
        for name in dict.fromkeys(name for tables_of in each for name in tables_of):
            tables.setdefault(name, {}).setdefault(arm, {})[num] = _mean([part[name] for part in each if name in part])
    return tables


def _class_tables(score: Mapping[str, Any], names: object) -> dict[str, ByClass]:
    """Of one score: tables by name, or lists by class number as the frozen read-out has them."""
    tables: dict[str, ByClass] = {name: dict(table) for name, table in (score.get("by_class") or {}).items()}
    for name, values in (score.get("settings") or {}).items():
        if name.endswith(_BY_CLASS) and isinstance(values, list):
            known = isinstance(names, list) and len(names) == len(values)
            labels = names if known and isinstance(names, list) else [f"class {idx}" for idx in range(len(values))]
            tables.setdefault(_score_name(name), dict(zip(map(str, labels), values, strict=True)))
    return tables


def _score_name(name: str) -> str:
    short = name.removesuffix(_BY_CLASS)
    return {"iou": "IoU"}.get(short, short)


def _mean(tables: Iterable[ByClass]) -> dict[str, float | None]:
    values: dict[str, list[float]] = {}
    for table in tables:
        for name, value in table.items():
            known = values.setdefault(str(name), [])
            if value is not None and math.isfinite(value):
                known.append(float(value))
    return {name: statistics.fmean(known) if known else None for name, known in values.items()}
