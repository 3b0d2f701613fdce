"""Results of one task in several runs as one table.

Rivals that scored alike in every run, such as raw pixels, stand once; other arms stand once per run, under its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dtpipe.distill.downstream.paired import PairedDifference, difference_of, verdict
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report.section import Notes, Section
from dtpipe.pipeline.report.tasks.gallery import prediction_pictures
from dtpipe.pipeline.report.tasks.results import TaskResult, task_results
from dtpipe.pipeline.report.tasks.section import task_section

_DATA = (
    "images",
    "masks",
    "class_names",
    "test_images",
    "test_masks",
    "test_share",
    "resplit",
    "foreground",
    "px",
    "ignore_value",
    "resize",
    "limit",
    "seed",
    "probe",
)
"""Settings of an evaluation that say what was scored on, and how: scores of others do not compare."""

Named = Mapping[str, TaskResult]
"""Results by the name of their run."""
Value = TypeVar("Value")


def merged_sections(runs: Mapping[str, Path], config: ReportConfig, notes: Notes) -> Iterator[Section]:
    """One section per task and data; a result that one run alone has stands under that run's name."""
    groups: dict[tuple[str, ...], dict[str, TaskResult]] = {}
    for name, path in runs.items():
        for result in task_results(path, notes.leave_out):
            groups.setdefault(_key(result), {})[name] = result
    for named in groups.values():
        result = merged(named)
        section = task_section(result, prediction_pictures(result, config, notes))
        alone = f" (only {next(iter(named))})" if len(named) == 1 < len(runs) else ""
        yield Section(f"{section.title}{alone}", section.html)


def _key(result: TaskResult) -> tuple[str, ...]:
    config = result.document.get("config") or {}
    tune = {name: value for name, value in (config.get("tune") or {}).items() if name != "run"}
    data = [repr(config.get(name)) for name in _DATA] + [repr(tune)]
    return result.path.name, result.task, result.metric, str(result.num_test), *data


def merged(named: Named) -> TaskResult:
    """One result of all runs; differences and verdicts are those of the first run against each other."""
    first, *others = named
    if not others:
        return named[first]
    one = named[first]
    renamed = {name: _names(named, name) for name in named}
    subjects = tuple(renamed[name][result.subjects[0]] for name, result in named.items())
    differences = [_differences(named, first, other, renamed) for other in others]
    scores = dict.fromkeys(name for result in named.values() for name in result.others)
    tables = dict.fromkeys(name for result in named.values() for name in result.by_class)
    return replace(
        one,
        arms=_joined({name: result.arms for name, result in named.items()}, renamed),
        verdicts=tuple(sentence for part in differences if (sentence := verdict(part))),
        differences=tuple(difference for part in differences for difference in part),
        folders=_joined({name: result.folders for name, result in named.items()}, renamed),
        notes=tuple(dict.fromkeys(note for result in named.values() for note in result.notes)),
        subjects=subjects,
        others={
            score: _joined({name: result.others.get(score, {}) for name, result in named.items()}, renamed)
            for score in scores
        },
        chosen=_joined({name: result.chosen for name, result in named.items()}, renamed),
        by_class={
            table: _joined({name: result.by_class.get(table, {}) for name, result in named.items()}, renamed)
            for table in tables
        },
    )


def _names(named: Named, run: str) -> dict[str, str]:
    """What each arm of a run is called on the page."""
    result = named[run]
    return {arm: arm if _alike(named, arm) else f"{arm}, {run}" for arm in result.arms}


def _alike(named: Named, arm: str) -> bool:
    """True for an arm that is no subject, and whose scores are the same in all runs that have it."""
    having = [result.arms[arm] for result in named.values() if arm in result.arms]
    asked = any(arm in result.subjects for result in named.values())
    return not asked and all(arms == having[0] for arms in having)


def _joined(parts: Mapping[str, Mapping[str, Value]], renamed: Mapping[str, Mapping[str, str]]) -> dict[str, Value]:
    """Arms of all runs under their new names, rivals that stand once first."""
    joined = {renamed[run].get(arm, arm): value for run, arms in parts.items() for arm, value in arms.items()}
    own = {f"{arm}, {run}" for run, names in renamed.items() for arm in names}
    return {arm: value for alone in (False, True) for arm, value in joined.items() if (arm in own) == alone}


def _differences(
    named: Named, first: str, other: str, renamed: Mapping[str, Mapping[str, str]]
) -> list[PairedDifference]:
    """The subject of one run against that of another, by seed, from each number of labels that both have."""
    one, two = named[first], named[other]
    arms = [one.subjects[0], two.subjects[0]]
    names = [renamed[first][arms[0]], renamed[other][arms[1]]]
    cells: Sequence[Mapping[int, Any]] = [one.arms[arms[0]], two.arms[arms[1]]]
    found = [
        difference_of(names[0], names[1], num, cells[0][num].by_seed, cells[1][num].by_seed)
        for num in sorted(cells[0].keys() & cells[1].keys())
    ]
    return [difference for difference in found if difference is not None]
