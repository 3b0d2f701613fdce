"""Why students of mismatched pairs gain, and why labels beside features gave less than labels alone.

Both came out of the first four seeds of the main part of `labels.py`, where neither was expected; what is expected
here was written down before this was run. Its first seeds are those, so it explains what was seen in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from commands import Command
from contrasts import Question
from label_arms import (
    FEATURE,
    HEAVIER,
    LABEL,
    MIX,
    PER_DRAW,
    extraction,
    features_of,
    frozen,
    labels,
    run_of,
    soft_labels_of,
    student,
    table,
)
from label_protocol import MISMATCHED
from label_studies import SCORES, Study

from dtpipe.distill.downstream.extractors import RANDOM_INIT

WHY = "why"
STATISTICS = "statistics alone"
STILL = 1e-12
"""A rate at which no weight moves, so that only the statistics of batch norm do."""
HEAVY, HEAVIEST = HEAVIER


def _question(first: str, second: str, expected: str) -> Question:
    return Question(f"{first} - {second}", first, second, WHY, expected)


QUESTIONS = (
    _question(STATISTICS, RANDOM_INIT, "+0.03 to +0.06: what mismatched pairs gain"),
    _question(MISMATCHED, STATISTICS, "-0.02 to +0.02"),
    _question(FEATURE, STATISTICS, "+0.05 to +0.12"),
    _question(HEAVY, MIX, "+0.03 to +0.08"),
    _question(HEAVIEST, HEAVY, "+0.02 to +0.06"),
    _question(HEAVIEST, LABEL, "-0.03 to +0.03"),
)
PROTOCOL = {
    STATISTICS: "no weight is trained: as the arm feature, at a rate of 1e-12, so that batch norm alone follows the "
    "images; random has the mean 0 and the variance 1 of a new network there",
    f"{FEATURE}, {MISMATCHED}, {LABEL}, {MIX}": "as in the main part",
    ", ".join(
        HEAVIER
    ): "as mix, with the loss of equation (5) weighed by more than the 1 of equation (6): that loss has "
    "no factor of the squared temperature, 16, which would make its gradient as large as without one",
    **SCORES,
}


def of_seed(args: argparse.Namespace, seed: int) -> Iterator[Command]:
    """Features, labels and students, and the table of their scores."""
    base, draws = features_of(args, "teacher", seed), range(args.label_draws)
    yield extraction(args, "teacher", seed)
    yield student(args, FEATURE, seed, base)
    yield student(args, MISMATCHED, seed, base, "--mismatch", seed)
    yield student(args, STATISTICS, seed, base, "--lr", STILL)
    for draw in draws:
        yield from labels(args, seed, draw)
        for arm, weight in HEAVIER.items():
            words = [base, soft_labels_of(args, seed, draw), "--join", "-s", f"distill.labels.weight={weight}"]
            yield student(args, arm, seed, *words, draw=draw)
    arms = {arm: [run_of(args, arm, seed)] for arm in (FEATURE, MISMATCHED, STATISTICS)}
    arms |= {arm: [run_of(args, arm, seed, draw) for draw in draws] for arm in (*PER_DRAW, *HEAVIER)}
    yield frozen(args, seed, arms, table(args, WHY, seed), args.label_draws)


STUDY = Study(WHY, QUESTIONS, PROTOCOL, ("num_images", "num_held_out", "epochs", "label_draws"), of_seed)
