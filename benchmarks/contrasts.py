"""What tables of several seeds say of differences: paired by seed, with intervals, p adjusted by Holm, equivalence.

A seed varies the pre-training; in each, the scores of several draws of labels are averaged. Only draws that both arms
have are compared.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from dtpipe.distill.downstream.paired import CONFIDENCE, difference_of
from dtpipe.distill.downstream.result import FIXED, FOREGROUND_AP, HEAD

SEED_STEP = 100
"""Draw d of seed s is drawn with seed `SEED_STEP * s + d`."""
IOU, AP = "iou", "ap"
FOREGROUND_IOU = "foreground IoU"
"""As tasks that train have it beside mIoU."""

Scores = dict[tuple[str, int, str], dict[int, dict[int, float]]]
"""(arm, number of labelled images, score) to the value of each seed and draw."""


@dataclass(frozen=True)
class Question:
    """One difference that was decided on beforehand."""

    name: str
    first: str
    second: str
    kind: str
    """Of the tables: frozen or tuned."""
    expected: str


def read_scores(paths: Iterable[Path]) -> Scores:
    """The headline's scores of all draws, from what `dtpipe eval` wrote; tables may hold the same arm twice.

    Tasks that train lead with mIoU and have foreground IoU beside it, the read-out leads with the latter; of digits
    all have mIoU.
    """
    scores: Scores = {}
    for path in paths:
        for score in json.loads(path.read_text(encoding="utf-8"))["scores"]:
            if score["level"] not in (FIXED, HEAD):
                continue
            seed, draw = divmod(score["seed"], SEED_STEP)
            others = score["others"]
            values = {IOU: others.get(FOREGROUND_IOU, score["value"]), AP: others.get(FOREGROUND_AP)}
            for name, value in values.items():
                if value is not None:
                    key = (score["extractor"], score["num_labelled"], name)
                    scores.setdefault(key, {}).setdefault(seed, {})[draw] = value
    return scores


def by_seed(scores: Scores, arm: str, num: int, score: str = IOU, like: str | None = None) -> dict[int, float]:
    """An arm's mean over draws, by seed; `like`: over the draws that this other arm has too."""
    own, others = scores.get((arm, num, score), {}), scores.get((like or arm, num, score), {})
    shared = {seed: draws.keys() & others.get(seed, {}).keys() for seed, draws in own.items()}
    return {
        seed: statistics.fmean(own[seed][draw] for draw in sorted(draws)) for seed, draws in shared.items() if draws
    }


def compared(
    scores: Scores, first: str, second: str, num: int, score: str = IOU, other_scores: Scores | None = None
) -> dict[str, Any]:
    """An arm's mean minus another's, its 95 % interval by Student's t over seeds, and p; None where no seed has both.

    `other_scores`: of the second arm, where its tables are others.
    """
    both = scores | {key: values for key, values in (other_scores or {}).items() if key[0] == second}
    one, other = by_seed(both, first, num, score, second), by_seed(both, second, num, score, first)
    difference = difference_of(first, second, num, one, other)
    if difference is None:
        return {"mean": None, "low": None, "high": None, "n": 0, "p": None}
    values = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    own = {name: getattr(difference, name) for name in ("mean", "low", "high", "n")}
    return own | {"p": p_value(values), "by_seed": [round(value, 5) for value in values]}


def p_value(values: Sequence[float]) -> float | None:
    """Of the mean being 0, two-sided, by Student's t; None of one value. Equal values leave no doubt."""
    if len(values) < 2:
        return None
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * student_t.sf(abs(mean) * math.sqrt(len(values)) / deviation, len(values) - 1))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p adjusted for all that are there: the smallest times their number, the next times one less, never falling.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    there = sorted((p, idx) for idx, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, idx) in enumerate(there):
        largest = max(largest, min(1.0, (len(there) - rank) * p))
        adjusted[idx] = largest
    return adjusted


def answered(questions: Sequence[Question], scores: Mapping[str, Scores], num: int, score: str) -> list[dict[str, Any]]:
    """Every question at one number of labelled images, with p adjusted over all of them."""
    found = [compared(scores[asked.kind], asked.first, asked.second, num, score) for asked in questions]
    adjusted = holm([difference["p"] for difference in found])
    return [
        {"contrast": asked.name, "labelled": num, "score": score, "expected": asked.expected, **difference, "p_holm": p}
        for asked, difference, p in zip(questions, found, adjusted, strict=True)
    ]


def equivalence(difference: Mapping[str, Any], p_holm: float | None, margin: float) -> str:
    """Whether two settings differ, are equal within a margin, or neither can be said.

    Equal: the 95 % interval lies within the margin, which asks for more than two one-sided tests at 5 % do.
    """
    low, high = difference["low"], difference["high"]
    return verdict(p_holm, None if low is None else -margin < low and high < margin, f"{margin:g}")


def verdict(p_holm: float | None, equal: bool | None, margin: str) -> str:
    """Different: p after Holm is below 1 - `CONFIDENCE`. Both: a difference that does not matter."""
    if equal is None or p_holm is None:
        return "undecided"
    differs = p_holm < 1 - CONFIDENCE
    if differs and equal:
        return f"different, by less than {margin}"
    return "different" if differs else f"equal within {margin}" if equal else "undecided"


def kept_gain(
    scores: Scores, setting: str, reference: str, base: str, num: int, share: float, score: str = IOU
) -> dict[str, Any]:
    """Whether a setting lies within a share of what the reference gains on a base, above it and below.

    For each seed d = setting - reference and m = share * (reference - base): two one-sided tests of d + m > 0 and
    m - d > 0, each at (1 - `CONFIDENCE`) / 2. The margin is measured too, so its spread counts.

    Source: Hauck & Anderson, Some issues in the design and analysis of equivalence trials, 1999 (a share of an effect);
    Schuirmann, 1987 (two one-sided tests).
    """
    difference = compared(scores, setting, reference, num, score)
    gains = compared(scores, reference, base, num, score)
    line = {"setting": setting, "labelled": num, "score": score, **difference}
    apart, margins = difference.get("by_seed", []), [share * gain for gain in gains.get("by_seed", [])]
    if len(apart) < 2 or len(apart) != len(margins):
        return {**line, "margin": None, "kept": None, "p_margin": None, "within": None}
    sides = (
        [d + m for d, m in zip(apart, margins, strict=True)],
        [m - d for d, m in zip(apart, margins, strict=True)],
    )
    p = max(above_zero(side) for side in sides)
    return {
        **line,
        "margin": statistics.fmean(margins),
        "kept": 1 + difference["mean"] / gains["mean"] if gains["mean"] else None,
        "p_margin": p,
        "within": p < (1 - CONFIDENCE) / 2,
    }


def above_zero(values: Sequence[float]) -> float:
    """p of a one-sided test that the mean of two values or more is above 0, by Student's t."""
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    if deviation == 0:
        return 0.0 if mean > 0 else 1.0
    return float(student_t.sf(mean * math.sqrt(len(values)) / deviation, len(values) - 1))


def means(scores: Scores) -> list[dict[str, Any]]:
    """Mean over seeds and draws of every arm, and the deviation over seeds."""
    lines = []
    for arm, num, score in scores:
        values = list(by_seed(scores, arm, num, score).values())
        std = statistics.stdev(values) if len(values) > 1 else None
        line = {"arm": arm, "labelled": num, "score": score, "mean": statistics.fmean(values), "std": std}
        lines.append({**line, "seeds": len(values)})
    return lines


def plain(scores: Scores) -> list[dict[str, Any]]:
    """All scores, a line for each arm, number of labelled images, score and seed."""
    return [
        {"arm": arm, "labelled": num, "score": score, "seed": seed, "draws": [draws[draw] for draw in sorted(draws)]}
        for (arm, num, score), of_seed in scores.items()
        for seed, draws in of_seed.items()
    ]


def from_plain(lines: Iterable[Mapping[str, Any]]) -> Scores:
    """The inverse of `plain`, where draws count from 0."""
    scores: Scores = {}
    for line in lines:
        key = (line["arm"], line["labelled"], line["score"])
        scores.setdefault(key, {})[line["seed"]] = dict(enumerate(line["draws"]))
    return scores


def joined(one: Scores, other: Scores) -> Scores:
    """All seeds of both."""
    keys = dict.fromkeys((*one, *other))
    return {key: {**one.get(key, {}), **other.get(key, {})} for key in keys}
