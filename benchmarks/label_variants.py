"""What single settings of feature distillation do, by the protocol of `labels.py`: different, equal, or undecided.

Each variant is one change to the arm `feature`, which learns one frozen draw at T = 50; seeds, weights and order are
the same. Variants of noise train for `--long-epochs`, where a frozen draw could be learned by heart, and have a base
of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from commands import Command
from contrasts import Question
from label_arms import FEATURE, TIMESTEP, extraction, features_of, frozen, run_of, student, table
from label_studies import SCORES, Study

TIMESTEPS = (20, 150, 250)
THREE = (TIMESTEP, 150, 250)
DRAWS = 8
DETERMINISTIC, WITH_T, WITHOUT_T = "deterministic", "three T, heads with t", "three T, heads without t"
CHANNEL, DATASET = "whitened by channel", "whitened by dataset"
LONG, LONG_DRAWS, LONG_LIVE = "long", f"long, {DRAWS} draws", "long, live"
TABLES = "variants"


def _question(first: str, second: str) -> Question:
    return Question(f"{first} - {second}", first, second, TABLES, "none")


QUESTIONS = (
    *(_question(f"T {timestep}", FEATURE) for timestep in TIMESTEPS),
    _question(DETERMINISTIC, FEATURE),
    _question(LONG_DRAWS, LONG),
    _question(LONG_LIVE, LONG),
    _question(LONG_LIVE, LONG_DRAWS),
    _question(WITH_T, WITHOUT_T),
    _question(CHANNEL, FEATURE),
    _question(DATASET, FEATURE),
)
PROTOCOL = {
    FEATURE: f"the arm of the main part: stochastic, T = {TIMESTEP}, one frozen draw, whitened by layer",
    DETERMINISTIC: "features of the image carried to T by DDIM inversion",
    f"{LONG}, {LONG_DRAWS}, {LONG_LIVE}": "more epochs: of one stored draw, of several, of a fresh one in each epoch",
    f"{WITH_T}, {WITHOUT_T}": f"one draw at each of T = {', '.join(map(str, THREE))}, one of them a step",
    f"{CHANNEL}, {DATASET}": "W of equation (1): over the channels of each position; each channel by its statistics",
    **SCORES,
}


UPRIGHT = ("-s", "distill.flip=false")
"""Live training mirrors images unless it is told not to; stored features here are of unmirrored ones."""


def of_seed(args: argparse.Namespace, seed: int) -> Iterator[Command]:
    """Features and students of all variants, and the table of their scores."""
    made = list(students(args, seed))
    yield from (command for _, command in made)
    arms = {arm: [run_of(args, arm, seed)] for arm, _ in made if arm is not None}
    yield frozen(args, seed, arms, table(args, TABLES, seed), args.draws)


def students(args: argparse.Namespace, seed: int) -> Iterator[tuple[str | None, Command]]:
    """Each command with the arm that it trains; None for features."""
    base, three, several = (features_of(args, name, seed) for name in ("teacher", "three", "draws"))
    yield None, extraction(args, "teacher", seed)
    yield FEATURE, student(args, FEATURE, seed, base)
    for timestep in TIMESTEPS:
        yield None, extraction(args, f"T{timestep}", seed, timesteps=(timestep,))
        yield f"T {timestep}", student(args, f"T {timestep}", seed, features_of(args, f"T{timestep}", seed))
    yield None, extraction(args, DETERMINISTIC, seed, "-s", "extract.teacher.options.encoding=ddim_inversion")
    yield DETERMINISTIC, student(args, DETERMINISTIC, seed, features_of(args, DETERMINISTIC, seed))
    yield None, extraction(args, "three", seed, timesteps=THREE)
    yield WITH_T, student(args, WITH_T, seed, three, "-s", "distill.regressor.timestep=true")
    yield WITHOUT_T, student(args, WITHOUT_T, seed, three, "-s", "distill.regressor.timestep=false")
    yield CHANNEL, student(args, CHANNEL, seed, base, "-s", "distill.loss.whiten=channel")
    yield DATASET, student(args, DATASET, seed, base, "-s", "distill.loss.whiten=dataset")
    yield None, extraction(args, "draws", seed, "--draws", DRAWS)
    long = args.long_epochs
    yield LONG, student(args, LONG, seed, base, epochs=long)
    yield LONG_DRAWS, student(args, LONG_DRAWS, seed, several, epochs=long)
    yield LONG_LIVE, student(args, LONG_LIVE, seed, base, "--reencode", 1, *UPRIGHT, epochs=long)


STUDY = Study(TABLES, QUESTIONS, PROTOCOL, ("num_images", "num_held_out", "epochs", "long_epochs", "draws"), of_seed)
