"""The commands of the benchmark of label guidance: each variant changes what it is named after, and nothing else."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

import label_variants  # noqa: E402
from label_arms import FEATURE  # noqa: E402
from labels import frozen_tables, parse, tuned_tables  # noqa: E402

SET = "-s"


def given(command: list[str]) -> Counter[str]:
    """The words of a distillation, without its data and its place."""
    place = command.index("--out")
    return Counter([*command[2:place], *command[place + 2 :]])


@pytest.mark.parametrize(
    ("variant", "base", "added"),
    [
        *((f"T {timestep}", FEATURE, []) for timestep in label_variants.TIMESTEPS),
        (label_variants.DETERMINISTIC, FEATURE, []),
        (label_variants.LONG_DRAWS, label_variants.LONG, []),
        (label_variants.LONG_LIVE, label_variants.LONG, ["--reencode", "1", SET, "distill.flip=false"]),
        (label_variants.CHANNEL, FEATURE, [SET, "distill.loss.whiten=channel"]),
        (label_variants.DATASET, FEATURE, [SET, "distill.loss.whiten=dataset"]),
    ],
)
def test_a_variant_differs_from_its_base_by_its_words_or_its_features(
    variant: str, base: str, added: list[str]
) -> None:
    made = dict(label_variants.students(parse([]), 3))
    ours, theirs = made[variant], made[base]
    assert given(ours) - given(theirs) == Counter(added) and not given(theirs) - given(ours)
    assert (ours[1] == theirs[1]) == bool(added)  # the features


def test_students_that_learned_all_masks_are_of_the_call_itself() -> None:
    """Seeds that are added to an earlier result train one anew, from their own first student."""
    args = parse([])
    args.first, args.seeds = 4, 2
    trained = list(tuned_tables(args, {"all": 0.01, "scratch": 0.01}))[-1]
    name = Path(trained[trained.index("--out") + 1]).with_suffix("")
    read = [word for command in frozen_tables(args) for word in command if word.startswith("all masks=")]
    assert (name.name, trained[1]) == ("4", str(args.work / "students" / FEATURE / "4"))
    assert set(read) == {f"all masks={name}/random-initialisation-1000-0"}
