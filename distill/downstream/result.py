"""Scores of downstream tasks: one record per arm, candidate and labelled draw; means and spreads; JSON and a table.

The headline is one candidate that is the same for every arm and draw: nothing is chosen for it. Below it stands the
best level of each arm, chosen anew in each draw from its labelled images only; all levels are kept.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dtpipe.distill.downstream.paired import PairedDifference, difference_of, interval, verdict
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.words import count_of

ALL_LEVELS = "all"
"""Name of the candidate that concatenates every level."""
BEST = "best"
FIXED = "fixed"
"""Name of the candidate that nothing was chosen for: the headline of frozen features."""
ACCURACY = "accuracy"
FOREGROUND_AP = "foreground AP"
"""Average precision of the second of two classes, pixel by pixel or cell by cell."""
_FEW_SCORES = 3  # other scores with a table of their own
HEAD = "head"
"""Level name of a network scored by its own output rather than by a classifier on a level."""


@dataclass(frozen=True)
class Score:
    """One held-out score in [0, 1]; `selection` is the score on the labelled images that chose level and settings."""

    extractor: str
    level: str
    num_labelled: int
    seed: int
    value: float
    selection: float | None = None
    best: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    """Other scores of the same predictions, by name."""
    by_class: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Name of score to name of class to value; None where the class does not occur."""


@dataclass(frozen=True)
class Summary:
    """Mean over draws and sample standard deviation (None for one draw); `levels` counts those chosen as best."""

    extractor: str
    level: str
    num_labelled: int
    mean: float
    std: float | None
    num_seeds: int
    levels: dict[str, int]
    others: dict[str, float] = field(default_factory=dict)
    """Means of the other scores."""


def mark_best(candidates: Sequence[Score]) -> list[Score]:
    """The candidates of one extractor and draw, the one with the highest `selection` marked.

    Ties, and draws too small for any selection, go to the later candidate: the deeper level, or all of them.
    """
    scores = [float("-inf") if score.selection is None else score.selection for score in candidates]
    best_idx = max(range(len(candidates)), key=lambda idx: (scores[idx], idx))
    return [replace(score, best=idx == best_idx) for idx, score in enumerate(candidates)]


@dataclass(frozen=True)
class ProbeResult:
    """All scores of one task on one held-out set."""

    task: str
    metric: str
    num_test: int
    scores: tuple[Score, ...]
    notes: tuple[str, ...] = ()
    headline: str = ""
    """What the headline's candidate is: a clause."""
    subject: str | None = None
    """The arm that is asked about."""
    reference: str | None = None
    """The arm that the verdict compares it with."""

    def summaries(self) -> list[Summary]:
        """The headline, the best level, then every level, of each arm and number of labels, as they were scored."""
        groups: dict[tuple[str, str, int], list[Score]] = {}
        for score in self.scores:
            if score.level == FIXED:
                groups.setdefault((score.extractor, FIXED, score.num_labelled), []).append(score)
        for score in self.scores:
            if score.best:
                groups.setdefault((score.extractor, BEST, score.num_labelled), []).append(score)
        for score in self.scores:
            if score.level != FIXED:
                groups.setdefault((score.extractor, score.level, score.num_labelled), []).append(score)
        return [_summarise(*group, scores) for group, scores in groups.items()]

    def best(self, extractor: str, num_labelled: int) -> Summary:
        """The row of the table for one extractor at its best level. Raises: ConfigError when it was not scored."""
        for summary in self.summaries():
            if (summary.extractor, summary.level, summary.num_labelled) == (extractor, BEST, num_labelled):
                return summary
        known = sorted({(score.extractor, score.num_labelled) for score in self.scores})
        raise ConfigError(
            f"{extractor!r} with {count_of(num_labelled, 'labelled image')} was not scored; there are {known}"
        )

    def arms(self) -> list[str]:
        """Names of the arms in the order they were scored."""
        return list(dict.fromkeys(score.extractor for score in self.scores))

    def by_seed(self, arm: str) -> dict[int, dict[int, float]]:
        """The headline scores of an arm: number of labelled images to seed to score."""
        own = [score for score in self.scores if score.extractor == arm]
        chosen = [score for score in own if score.level in (FIXED, HEAD)] or [score for score in own if score.best]
        values: dict[int, dict[int, float]] = {}
        for score in chosen:
            values.setdefault(score.num_labelled, {})[score.seed] = score.value
        return values

    def differences(self) -> list[PairedDifference]:
        """The subject's headline scores minus those of every other arm, by number of labels; none without a subject."""
        if self.subject is None:
            return []
        own = self.by_seed(self.subject)
        others = {arm: self.by_seed(arm) for arm in self.arms() if arm != self.subject}
        found = [
            difference_of(self.subject, arm, num, own[num], values[num])
            for arm, values in others.items()
            for num in sorted(own.keys() & values.keys())
        ]
        return [difference for difference in found if difference is not None]

    def verdict(self) -> str:
        """One sentence on the subject against the reference; empty where there is none."""
        return verdict([difference for difference in self.differences() if difference.other == self.reference])

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values that `json.dumps` takes."""
        document = asdict(self)
        document["summaries"] = [asdict(summary) for summary in self.summaries()]
        document["differences"] = [asdict(difference) for difference in self.differences()]
        document["verdict"] = self.verdict()
        return document

    def to_table(self, levels: bool = False) -> str:
        """Plain text: the headline, differences, verdict, and what was chosen below; `levels`: every level too.

        Arms stand down and numbers of labelled images across, cells are mean ± spread.
        """
        summaries = self.summaries()
        num_seeds = max(summary.num_seeds for summary in summaries)
        spread = f"mean ± standard deviation over {num_seeds} seeds" if num_seeds > 1 else "one seed"
        lines = [f"{self.task}: {self.metric} on {count_of(self.num_test, 'held-out image')}, {spread}"]
        top = headline_rows(summaries)
        lines += [self.headline] if self.headline else []
        lines += _grid("features", _cells(top, _cell))
        lines += _other_scores(top)
        lines += self._compared()
        chosen = [summary for summary in summaries if summary.level == BEST and set(summary.levels) != {HEAD}]
        if chosen and any(summary.level == FIXED for summary in summaries):
            lines += ["", "best level and regularisation of each, chosen by folds of the labelled images"]
            lines += _grid("features", _cells(chosen, _cell))
        if levels:
            kept = [summary for summary in summaries if summary.level not in (BEST, FIXED)]
            named = [replace(summary, extractor=f"{summary.extractor}, {summary.level}") for summary in kept]
            named.sort(key=lambda summary: self.arms().index(summary.extractor.rpartition(", ")[0]))
            lines += ["", "every level", *_grid("features, level", _cells(named, _cell))]
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])

    def _compared(self) -> list[str]:
        """Differences to the other arms and the verdict, where there is an arm that is asked about."""
        differences = self.differences()
        if not differences:
            return []
        cells: dict[str, dict[int, str]] = {}
        for difference in differences:
            cells.setdefault(difference.other, {})[difference.num_labelled] = interval(difference)
        paired = "paired by seed, 95 % interval" if max(one.n for one in differences) > 1 else "one seed, no interval"
        said = self.verdict()
        return ["", f"{self.subject} minus each other, {paired}", *_grid("other", cells), *(["", said] if said else [])]

    @staticmethod
    def merge(results: Sequence[ProbeResult]) -> ProbeResult:
        """Results of one task from several runs, say one per seed of a distillation, as one.

        Raises: ConfigError when the tasks, metrics or sizes of the held-out sets differ.
        """
        first = results[0]
        for other in results[1:]:
            for name in ("task", "metric", "num_test"):
                if getattr(other, name) != getattr(first, name):
                    raise ConfigError(
                        f"results differ in {name}: {getattr(first, name)} and {getattr(other, name)}; merge equal ones"
                    )
        notes = dict.fromkeys(note for result in results for note in result.notes)
        return replace(first, scores=tuple(score for result in results for score in result.scores), notes=tuple(notes))


def headline_rows(summaries: Sequence[Summary]) -> list[Summary]:
    """The summaries of the headline: of each arm the fixed candidate or its own head, else the best level."""
    return [summary for summary in summaries if summary.level == _headline_level(summaries, summary.extractor)]


def headline_of(document: Mapping[str, Any]) -> list[Summary]:
    """The headline in the JSON of a result; in one from before there was a headline, the best levels.

    Raises: KeyError, TypeError, ValueError for another document.
    """
    return headline_rows([Summary(**summary) for summary in document["summaries"]])


def _headline_level(summaries: Sequence[Summary], extractor: str) -> str:
    levels = {summary.level for summary in summaries if summary.extractor == extractor}
    return next((level for level in (FIXED, HEAD) if level in levels), BEST)


def _summarise(extractor: str, level: str, num_labelled: int, scores: Sequence[Score]) -> Summary:
    values = [score.value for score in scores]
    std = statistics.stdev(values) if len(values) > 1 else None
    levels = dict(Counter(score.level for score in scores))
    names = dict.fromkeys(name for score in scores for name in score.others)
    others = {name: statistics.fmean(score.others[name] for score in scores if name in score.others) for name in names}
    return Summary(extractor, level, num_labelled, statistics.fmean(values), std, len(values), levels, others)


def _cell(summary: Summary) -> str:
    return f"{summary.mean:.3f}" if summary.std is None else f"{summary.mean:.3f} ± {summary.std:.3f}"


def _other_scores(top: Sequence[Summary]) -> list[str]:
    """Other scores of the headline's predictions: a table of each, or of many one, at the most labelled images."""
    names = dict.fromkeys(name for summary in top for name in summary.others)
    if len(names) <= _FEW_SCORES:
        tables = {name: _grid("features", _cells(top, _other(name))) for name in names}
        return [line for name in names for line in ("", f"{name}, of the same predictions", *tables[name])]
    most = max(summary.num_labelled for summary in top)
    arms = {summary.extractor: summary for summary in top if summary.num_labelled == most}
    rows = [[name, *map(_other(name), arms.values())] for name in names]
    return ["", f"other scores of the same predictions, {most} labelled", *_aligned([["score", *arms], *rows])]


def _other(name: str) -> Callable[[Summary], str]:
    return lambda summary: f"{summary.others[name]:.3f}" if name in summary.others else "-"


def _cells(summaries: Sequence[Summary], shown: Callable[[Summary], str]) -> dict[str, dict[int, str]]:
    """Arm to number of labelled images to what is shown of it."""
    cells: dict[str, dict[int, str]] = {}
    for summary in summaries:
        cells.setdefault(summary.extractor, {})[summary.num_labelled] = shown(summary)
    return cells


def _grid(corner: str, cells: Mapping[str, Mapping[int, str]]) -> list[str]:
    """Arms down, numbers of labelled images across."""
    columns = sorted({num for row in cells.values() for num in row})
    head = [corner, *(f"{num} labelled" for num in columns)]
    return _aligned([head, *([arm, *(row.get(num, "-") for num in columns)] for arm, row in cells.items())])


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
