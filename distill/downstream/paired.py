"""Whether one arm is better than another: differences paired by seed, with their interval, and a sentence.

A seed varies labels, initialisation and run of all arms together, so that what they share cancels in the difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtpipe.manifests.words import count_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """The mean of an arm's scores minus another's, over seeds, and where it lies with 95 % confidence."""

    arm: str
    other: str
    num_labelled: int
    mean: float
    low: float | None
    """None for one seed."""
    high: float | None
    n: int
    """Pairs."""


def paired_differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Differences of scores by seed, over the seeds of both.

    An arm with a single score is one that no seed changes, such as a fixed network with all images labelled: it stands
    against every score of the other.
    """
    if len(first) == 1 and len(second) > 1:
        return [value - other for value in first.values() for other in second.values()]
    if len(second) == 1 and len(first) > 1:
        return [value - other for value in first.values() for other in second.values()]
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def difference_of(
    arm: str, other: str, num_labelled: int, first: Mapping[int, float], second: Mapping[int, float]
) -> PairedDifference | None:
    """An arm's scores by seed against another's; None where no seed has both.

    The interval is Student's t of the paired differences; with equal differences it has no width.
    """
    differences = paired_differences(first, second)
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return PairedDifference(arm, other, num_labelled, mean, None, None, n)
    half = half_interval(differences)
    return PairedDifference(arm, other, num_labelled, mean, mean - half, mean + half, n)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the interval that holds the mean of two values or more with `CONFIDENCE`, by Student's t."""
    from scipy.stats import t  # slow to import, and read here alone

    num = len(values)
    return float(t.ppf((1 + CONFIDENCE) / 2, num - 1)) * statistics.stdev(values) / math.sqrt(num)


def interval(difference: PairedDifference) -> str:
    """`+0.021 [+0.012, +0.030]`; for one pair `+0.021`."""
    if difference.low is None or difference.high is None:
        return _signed(difference.mean)
    return f"{_signed(difference.mean)} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _signed(value: float) -> str:
    """Three places; nothing is less than nothing."""
    return f"{round(value, 3) + 0.0:+.3f}"


def verdict(differences: Sequence[PairedDifference]) -> str:
    """One sentence on an arm against one other, by number of labelled images; empty where there is no difference."""
    if not differences:
        return ""
    first = differences[0]
    clauses = ", ".join(_clause(difference) for difference in differences)
    nums = sorted({difference.n for difference in differences})
    if nums == [1]:
        return f"{first.arm} against {first.other}: {clauses}; one seed, which says nothing of chance"
    counted = " and ".join(map(str, nums))
    return (
        f"{first.arm} against {first.other}: {clauses}; n = {counted}, {CONFIDENCE:.0%} intervals of paired differences"
    )


def _clause(difference: PairedDifference) -> str:
    where = f"from {count_of(difference.num_labelled, 'labelled image')}"
    if difference.low is None or difference.high is None:
        return f"{_signed(difference.mean)} {where}"
    if difference.low <= 0 <= difference.high:
        return f"no difference seen {where}: {interval(difference)}"
    word, size = ("better", 1) if difference.mean > 0 else ("worse", -1)
    low, high = sorted((size * difference.low, size * difference.high))
    return f"{word} by {abs(difference.mean):.3f} [{low:.3f}, {high:.3f}] {where}"
