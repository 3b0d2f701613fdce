"""Paired differences against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dtpipe.distill.downstream.paired import difference_of, interval, paired_differences, verdict


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_interval_is_scipys_of_a_paired_t_test(n: int) -> None:
    first, second = np.random.default_rng(n).random((2, n))
    difference = difference_of("a", "b", 5, dict(enumerate(first)), dict(enumerate(second)))
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert difference is not None and difference.n == n
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=1e-12)
    assert difference.mean == pytest.approx((first - second).mean())


def test_an_interval_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, error 1/sqrt(3), t of 2 degrees of freedom 4.3027."""
    difference = difference_of("a", "b", 5, {0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), 0.0))
    assert difference is not None and difference.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)


def test_only_seeds_of_both_arms_are_paired_and_pairs_go_by_seed() -> None:
    assert paired_differences({0: 1.0, 1: 2.0, 7: 9.0}, {1: 0.5, 0: 0.0, 3: 4.0}) == [1.0, 1.5]
    assert difference_of("a", "b", 5, {0: 1.0, 1: 1.0}, {2: 1.0, 3: 1.0}) is None


def test_an_arm_that_no_seed_changes_stands_against_every_score() -> None:
    assert paired_differences({0: 1.0}, {0: 0.5, 1: 0.25}) == [0.5, 0.75]
    assert paired_differences({0: 0.5, 1: 0.25}, {0: 1.0}) == [-0.5, -0.75]


def test_equal_differences_have_an_interval_without_width() -> None:
    difference = difference_of("a", "b", 5, {0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5})
    assert difference is not None and (difference.low, difference.high) == (0.25, 0.25)


def test_the_verdict_says_better_worse_or_nothing_seen_for_each_number() -> None:
    values = {5: [0.2, 0.21, 0.22], 20: [-0.2, -0.21, -0.22], 80: [0.1, -0.1, 0.05]}
    differences = [
        difference_of("distilled", "scratch", num, dict(enumerate(own)), dict.fromkeys(range(3), 0.0))
        for num, own in values.items()
    ]
    said = verdict([difference for difference in differences if difference is not None])
    assert said == (
        "distilled against scratch: better by 0.210 [0.185, 0.235] from 5 labelled images, "
        "worse by 0.210 [0.185, 0.235] from 20 labelled images, "
        "no difference seen from 80 labelled images: +0.017 [-0.242, +0.275]; "
        "n = 3, 95% intervals of paired differences"
    )


def test_one_seed_has_no_interval_and_its_verdict_says_so() -> None:
    difference = difference_of("a", "b", 1, {0: 0.5}, {0: 0.25})
    assert difference is not None and (difference.low, interval(difference)) == (None, "+0.250")
    assert verdict([difference]) == "a against b: +0.250 from 1 labelled image; one seed, which says nothing of chance"
    assert verdict([]) == ""
    nothing = difference_of("a", "b", 1, {0: 0.5}, {0: 0.5001})
    assert nothing is not None and interval(nothing) == "+0.000"  # not -0.000
