"""The commands of the benchmark of label guidance: each variant changes what it is named after, and nothing else."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

import label_variants  # noqa: E402
import label_why  # noqa: E402
from label_arms import FEATURE, HEAVIER, MIX, labels, run_of  # noqa: E402
from label_protocol import MISMATCHED  # noqa: E402
from labels import frozen_tables, parse, pretraining, tuned_tables  # noqa: E402

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


@pytest.mark.parametrize(
    ("arm", "base", "added"),
    [
        (label_why.STATISTICS, FEATURE, ["--lr", "1e-12"]),
        (MISMATCHED, FEATURE, ["--mismatch", "3"]),
        *((arm, MIX, [SET, f"distill.labels.weight={weight}"]) for arm, weight in HEAVIER.items()),
    ],
)
def test_what_explains_the_main_part_differs_from_it_by_its_words(arm: str, base: str, added: list[str]) -> None:
    args = parse([])
    place = [run_of(args, name, 3, 1) for name in (arm, base)]
    of_place = {command[command.index("--out") + 1]: command for command in label_why.of_seed(args, 3)}
    ours, theirs = (of_place[str(where)] for where in place)
    assert given(ours) - given(theirs) == Counter(added) and not given(theirs) - given(ours)
    assert ours[1] == theirs[1] and (ours[2] == theirs[2]) == (base == MIX)  # the features, and the soft labels


def test_what_explains_the_main_part_compares_students_of_its_own_seeds() -> None:
    args = parse([])
    *made, scored = list(label_why.of_seed(args, 3))
    runs = {place for word in scored if "=" in word and "students" in word for place in word.split("=")[1].split(",")}
    assert runs == {command[command.index("--out") + 1] for command in made if command[0] == "distill"}
    main = [command for seed in (0, 3) for command in pretraining(args, seed)]
    assert [command for command in made if command in main] == made[:3] + [
        command for draw in range(args.label_draws) for command in labels(args, 3, draw)
    ]


def test_students_that_learned_all_masks_are_of_the_call_itself() -> None:
    """Seeds that are added to an earlier result train one anew, from their own first student."""
    args = parse([])
    args.first, args.seeds = 4, 2
    trained = list(tuned_tables(args, {"all": 0.01, "scratch": 0.01}))[-1]
    name = Path(trained[trained.index("--out") + 1]).with_suffix("")
    read = [word for command in frozen_tables(args) for word in command if word.startswith("all masks=")]
    assert (name.name, trained[1]) == ("4", str(args.work / "students" / FEATURE / "4"))
    assert set(read) == {f"all masks={name}/random-initialisation-1000-0"}
