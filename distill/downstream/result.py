"""Scores of downstream tasks: one record per extractor, level, labelled draw; means and spreads; JSON and a table.

The best level of an extractor is chosen anew in each draw, from its labelled images only; the other levels are kept.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.words import count_of

ALL_LEVELS = "all"
"""Name of the candidate that concatenates every level."""
BEST = "best"
ACCURACY = "accuracy"
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

    def summaries(self) -> list[Summary]:
        """The best level, then every level, of each extractor and number of labels, in the order they were scored."""
        groups: dict[tuple[str, str, int], list[Score]] = {}
        for score in self.scores:
            if score.best:
                groups.setdefault((score.extractor, BEST, score.num_labelled), []).append(score)
        for score in self.scores:
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

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values that `json.dumps` takes."""
        document = asdict(self)
        document["summaries"] = [asdict(summary) for summary in self.summaries()]
        return document

    def to_table(self, levels: bool = False) -> str:
        """Plain text: extractors down, numbers of labelled images across, mean ± spread; `levels`: every level too."""
        summaries = [summary for summary in self.summaries() if levels or summary.level == BEST]
        columns = sorted({summary.num_labelled for summary in summaries})
        cells: dict[tuple[str, str], dict[int, str]] = {}
        for summary in summaries:
            cells.setdefault((summary.extractor, summary.level), {})[summary.num_labelled] = _cell(summary)
        head = ["features", *(["level"] if levels else []), *(f"{num} labelled" for num in columns)]
        body = [
            [extractor, *([level] if levels else []), *(row.get(num, "-") for num in columns)]
            for (extractor, level), row in sorted(cells.items(), key=lambda item: _position(summaries, item[0][0]))
        ]
        num_seeds = max(summary.num_seeds for summary in summaries)
        spread = f"mean ± standard deviation over {num_seeds} seeds" if num_seeds > 1 else "one seed"
        title = f"{self.task}: {self.metric} on {count_of(self.num_test, 'held-out image')}, {spread}"
        how = "best level of each, chosen on the labelled images only; these are counted over all classes together"
        return "\n".join([title, how, *_aligned([head, *body]), *self.notes])

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


def _summarise(extractor: str, level: str, num_labelled: int, scores: Sequence[Score]) -> Summary:
    values = [score.value for score in scores]
    std = statistics.stdev(values) if len(values) > 1 else None
    levels = dict(Counter(score.level for score in scores))
    return Summary(extractor, level, num_labelled, statistics.fmean(values), std, len(values), levels)


def _cell(summary: Summary) -> str:
    return f"{summary.mean:.3f}" if summary.std is None else f"{summary.mean:.3f} ± {summary.std:.3f}"


def _position(summaries: Sequence[Summary], extractor: str) -> int:
    return [summary.extractor for summary in summaries].index(extractor)


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
