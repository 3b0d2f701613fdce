"""What benchmarks say of differences: Holm and Student's t by hand, draws that both arms have, different and equal."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

from contrasts import (  # noqa: E402
    AP,
    IOU,
    Question,
    above_zero,
    answered,
    by_seed,
    compared,
    equivalence,
    from_plain,
    holm,
    joined,
    kept_gain,
    means,
    p_value,
    plain,
    read_scores,
    verdict,
)

DIFFERENCES = [0.03, 0.01, 0.04, 0.02]
"""Mean 0.025, deviation sqrt(5/3) / 100; t = 0.025 / (0.012910 / 2) = 3.87298 at 3 degrees of freedom."""


def table(path: Path, scores: list[tuple[str, int, int, float, float | None]], level: str = "fixed") -> Path:
    """A result of `dtpipe eval`: arm, labelled, seed, IoU, AP; beside it a level that is no headline."""
    lines: list[dict[str, Any]] = []
    for arm, num, seed, iou, precision in scores:
        others: dict[str, float] = {} if precision is None else {"foreground AP": precision}
        if level == "head":  # of a task that trains, whose value is mIoU
            others, iou = {**others, "foreground IoU": iou}, (1 + iou) / 2
        own = {"extractor": arm, "num_labelled": num, "seed": seed, "value": iou, "others": others}
        lines += [{**own, "level": level}, {**own, "level": "l2", "value": 9.0}]
    path.write_text(json.dumps({"scores": lines}))
    return path


def t_tail_of_three_degrees(t: float) -> float:
    """Two-sided p of Student's t at 3 degrees of freedom, whose distribution has a closed form."""
    x = t / math.sqrt(3)
    return 1 - 2 / math.pi * (math.atan(x) + x / (1 + x * x))


def test_p_is_that_of_the_closed_form() -> None:
    assert p_value(DIFFERENCES) == pytest.approx(t_tail_of_three_degrees(math.sqrt(15)), rel=1e-9)
    assert p_value([-value for value in DIFFERENCES]) == p_value(DIFFERENCES)
    assert p_value([0.1]) is None
    assert (p_value([0.0, 0.0, 0.0]), p_value([0.5, 0.5])) == (1.0, 0.0)


def test_holm_is_the_example_of_the_definition() -> None:
    """Of 4: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04, which may not be below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([None, 0.02, None, 0.04]) == pytest.approx([None, 0.04, None, 0.04])
    assert holm([]) == []


def test_holm_rejects_what_stepping_down_rejects() -> None:
    """The procedure as Holm tells it: from the smallest p on, until one is not below alpha over those that are left."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        ps = (generator.random(6) ** 3).tolist()
        rejected = set()
        for rank, idx in enumerate(np.argsort(ps).tolist()):
            if ps[idx] > 0.05 / (6 - rank):
                break
            rejected.add(idx)
        assert {idx for idx, p in enumerate(holm(ps)) if p is not None and p <= 0.05} == rejected


def test_seeds_are_paired_over_the_draws_of_both_arms(tmp_path: Path) -> None:
    """Seed 102 is draw 2 of seed 1. The label arm has draw 0 alone; the table beside repeats the random arm."""
    first = [("feature", 20, 100 * seed + draw, 0.5 + value + draw, 0.6) for seed, value in enumerate(DIFFERENCES)
             for draw in range(3)]  # fmt: skip
    random = [("random", 20, 100 * seed + draw, 0.5 + draw, None) for seed in range(4) for draw in range(3)]
    label = [("label", 20, 100 * seed, 0.6, 0.7) for seed in range(3)]
    scores = read_scores(
        [table(tmp_path / "a.json", first + random), table(tmp_path / "b.json", label + random[:1], "head")]
    )
    assert by_seed(scores, "feature", 20) == pytest.approx(
        {seed: 1.5 + value for seed, value in enumerate(DIFFERENCES)}
    )
    difference = compared(scores, "feature", "random", 20)
    half = 3.182446305284263 * math.sqrt(5 / 3) / 100 / 2  # t of 0.975 at 3 degrees of freedom, from a printed table
    assert difference["n"] == 4 and difference["mean"] == pytest.approx(0.025)
    assert (difference["low"], difference["high"]) == pytest.approx((0.025 - half, 0.025 + half))
    assert difference["p"] == pytest.approx(t_tail_of_three_degrees(math.sqrt(15)))
    of_first_draw = compared(scores, "label", "feature", 20)
    assert of_first_draw["by_seed"] == pytest.approx([0.07, 0.09, 0.06]) and of_first_draw["n"] == 3
    assert compared(scores, "label", "nobody", 20) == {"mean": None, "low": None, "high": None, "n": 0, "p": None}
    assert compared(scores, "feature", "label", 20, AP)["mean"] == pytest.approx(-0.1)
    assert {(line["arm"], line["score"]): line["seeds"] for line in means(scores)} == {
        ("feature", IOU): 4, ("feature", AP): 4, ("random", IOU): 4, ("label", IOU): 3, ("label", AP): 3,
    }  # fmt: skip


def test_questions_are_answered_together(tmp_path: Path) -> None:
    scores = read_scores([
        table(tmp_path / "a.json", [(arm, 20, 100 * seed, base + value, None) for arm, base in (("a", 0), ("b", 1))
                                    for seed, value in enumerate(DIFFERENCES if arm == "a" else [0, 0, 0, 0.001])])
    ])  # fmt: skip
    questions = [Question("a - b", "a", "b", "frozen", "-1"), Question("b - c", "b", "c", "frozen", "?")]
    first, missing = answered(questions, {"frozen": scores}, 20, IOU)
    assert first["p_holm"] == first["p"] < 0.01 and missing["p_holm"] is None
    assert (first["contrast"], first["expected"], first["labelled"], missing["n"]) == ("a - b", "-1", 20, 0)


@pytest.mark.parametrize(
    ("low", "high", "p", "said"),
    [
        (0.01, 0.05, 0.001, "different"),
        (0.001, 0.015, 0.02, "different, by less than 0.02"),
        (-0.01, 0.019, 0.5, "equal within 0.02"),
        (-0.01, 0.021, 0.5, "undecided"),
        (0.001, 0.05, 0.06, "undecided"),  # after Holm
        (None, None, None, "undecided"),
    ],
)
def test_a_difference_is_seen_excluded_or_neither(low: float | None, high: float | None, p: float, said: str) -> None:
    assert equivalence({"low": low, "high": high}, p, 0.02) == said


def test_a_gain_is_kept_where_both_one_sided_tests_say_so(tmp_path: Path) -> None:
    """At 3 degrees of freedom one side is half of the closed form's two. The reference gains 0.2 in each seed, so the
    margin is 0.1; the differences have the mean 0.025, so the upper side, 0.1 - 0.025, is the nearer one."""
    arms = {"setting": [0.7 + value for value in DIFFERENCES], "reference": [0.7] * 4, "random": [0.5] * 4}
    rows = [(arm, 20, 100 * seed, value, None) for arm, values in arms.items() for seed, value in enumerate(values)]
    scores = read_scores([table(tmp_path / "a.json", rows)])
    line = kept_gain(scores, "setting", "reference", "random", 20, 0.5)
    error = math.sqrt(5 / 3) / 100 / 2
    assert line["p_margin"] == pytest.approx(t_tail_of_three_degrees((0.1 - 0.025) / error) / 2, rel=1e-6)
    assert (line["margin"], line["kept"], line["within"]) == (pytest.approx(0.1), pytest.approx(1.125), True)
    narrow = kept_gain(scores, "setting", "reference", "random", 20, 0.15)
    assert narrow["p_margin"] == pytest.approx(t_tail_of_three_degrees((0.03 - 0.025) / error) / 2, rel=1e-6)
    assert narrow["within"] is False and verdict(0.5, False, "m") == "undecided"
    assert above_zero([-1.0, -1.0]) == 1.0 and above_zero([1.0, 1.0]) == 0.0
    assert above_zero([-value for value in DIFFERENCES]) == pytest.approx(1 - above_zero(DIFFERENCES))
    assert kept_gain(scores, "setting", "reference", "nobody", 20, 0.5)["within"] is None


def test_the_spread_of_the_gain_counts_in_the_margin(tmp_path: Path) -> None:
    """A setting that is the reference in every seed is equal to it only as far as there is a gain beyond chance."""
    for gains, within in (([0.2, 0.22, 0.18, 0.2], True), ([0.6, -0.2, 0.5, -0.1], False)):
        arms = {"setting": [0.7] * 4, "reference": [0.7] * 4, "random": [0.7 - gain for gain in gains]}
        rows = [(arm, 20, 100 * seed, value, None) for arm, values in arms.items() for seed, value in enumerate(values)]
        scores = read_scores([table(tmp_path / f"{within}.json", rows)])
        assert kept_gain(scores, "setting", "reference", "random", 20, 0.5)["within"] is within


def test_seeds_of_an_earlier_result_are_those_that_were_written() -> None:
    first = {("a", 20, IOU): {0: {0: 0.5, 1: 0.25}, 1: {0: 0.75}}, ("b", 20, AP): {0: {0: 1.0}}}
    assert from_plain(json.loads(json.dumps(plain(first)))) == first
    second = {("a", 20, IOU): {2: {0: 0.125}}, ("c", 80, IOU): {2: {0: 0.0}}}
    both = joined(first, second)
    assert both["a", 20, IOU] == {0: {0: 0.5, 1: 0.25}, 1: {0: 0.75}, 2: {0: 0.125}}
    assert both.keys() == {*first, *second} and both["b", 20, AP] == {0: {0: 1.0}}
    assert by_seed(both, "a", 20) == {0: 0.375, 1: 0.75, 2: 0.125}
