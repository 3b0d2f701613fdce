"""The commands that make what the benchmark of label guidance compares: features, interpreters, labels, students."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from commands import Command, command_of
from contrasts import SEED_STEP, Scores, read_scores

PRIMARY = 20
"""Labelled scenes of the contrasts, and those that an interpreter learns from."""
LABELLED = (PRIMARY, 80)
BATCH = 32
TIMESTEP = 50
FEATURE, LABEL, MIX = "feature", "label", "mix"
PER_DRAW = (LABEL, MIX)
"""Arms with a student for each draw of labels."""
HEAVIER = {f"{MIX}, labels x {weight}": weight for weight in (4, 16)}
"""Such arms too, with the weight of the labels' loss."""


def seeds_of(args: argparse.Namespace) -> range:
    """The seeds of a call."""
    return range(args.first, args.first + args.seeds)


def features_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a feature dataset lies."""
    work: Path = args.work
    return work / "features" / name / str(seed)


def run_of(args: argparse.Namespace, arm: str, seed: int, draw: int = 0) -> Path:
    """The folder of an arm's student."""
    work: Path = args.work
    place = work / "students" / arm.replace(",", "").replace(" ", "_") / str(seed)
    return place / str(draw) if arm in (*PER_DRAW, *HEAVIER) else place


def head_of(args: argparse.Namespace, seed: int, draw: int) -> Path:
    """The folder of an interpreter."""
    work: Path = args.work
    return work / "heads" / str(seed) / str(draw)


def soft_labels_of(args: argparse.Namespace, seed: int, draw: int) -> Path:
    """Where soft labels lie."""
    return features_of(args, f"labels{draw}", seed)


def extraction(
    args: argparse.Namespace,
    name: str,
    seed: int,
    *extra: object,
    teacher: Path | None = None,
    timesteps: tuple[int, ...] = (TIMESTEP,),
) -> Command:
    """Features of the unlabelled scenes."""
    places = ["--images", args.work / "train" / "images", "--teacher", teacher or args.teacher]
    noise = ["--timesteps", ",".join(map(str, timesteps)), "-s", f"extract.noise.seed={seed}"]
    return command_of(
        "extract", "-c", "digits", *places, "--out", features_of(args, name, seed), *noise, *extra, "--inline"
    )


def student(args: argparse.Namespace, arm: str, seed: int, *words: object, draw: int = 0, epochs: int = 0) -> Command:
    """The distillation of an arm's student: all arms of a seed begin with the same weights and take the same order."""
    out = ["--seed", seed, "--epochs", epochs or args.epochs, "--batch-size", BATCH]
    return command_of("distill", *words, "-c", "digits", *out, "--out", run_of(args, arm, seed, draw))


def labels(args: argparse.Namespace, seed: int, draw: int) -> Iterable[Command]:
    """An interpreter of the scenes that a draw labels, its soft labels of all scenes, and the students of both arms.

    Only the first draw's is scored beside its rivals, on all held-out scenes; the others, on a few.
    """
    source, head = features_of(args, "teacher", seed), head_of(args, seed, draw)
    drawn = ["--labelled", PRIMARY, "--seed", SEED_STEP * seed + draw, "--flip", "never"]
    rivals = ["--pixel-models", args.pixel_models]
    if args.max_pixels:
        rivals += ["-s", f"interpret.rivals.max_pixels={args.max_pixels}"]
    if draw:
        rivals = ["--pixel-models", 0, "-s", "interpret.rivals.linear=false", "-s", "interpret.run.num_pictures=0"]
    held_out = args.work / ("few" if draw else "held_out")
    yield command_of("interpret", source, *masks_of(args, held_out=held_out), *drawn, *rivals, "--out", head)
    soft = soft_labels_of(args, seed, draw)
    yield command_of("extract", "--interpreter", head, "--from", source, "--out", soft, "--inline")
    joined, only = [source, soft, "--join"], ["-s", "distill.loss.mse_weight=0", "-s", "distill.loss.at_weight=0"]
    yield student(args, LABEL, seed, *joined, "-s", "distill.labels.weight=1", *only, draw=draw)
    yield student(args, MIX, seed, *joined, draw=draw)


def masks_of(
    args: argparse.Namespace, masks: str = "semantic", held_out: Path | None = None, foreground: bool = True
) -> list[str]:
    """Where labels are drawn from, and the held-out ones."""
    train, test = args.work / "train", held_out or args.work / "held_out"
    places = {"images": train / "images", "masks": train / masks}
    places |= {"test-images": test / "images", "test-masks": test / "semantic"}
    words = [str(word) for name, place in places.items() for word in (f"--{name}", place)]
    return [*words, *(["--foreground"] if foreground else [])]


def arm_words(arms: Mapping[str, Iterable[Path]]) -> list[str]:
    """The first arm, then `--compare` of the others."""
    first, *others = [f"{name}=" + ",".join(map(str, runs)) for name, runs in arms.items()]
    return [first, *(word for arm in others for word in ("--compare", arm))]


READOUT = ("-s", "eval.probe.l2_grid=[0.01]", "-s", "eval.probe.folds=2", "-s", "eval.probe.max_select_cells=256")
"""The headline is of all levels at the regularisation that nothing chose: what chooses among levels is made small."""


def frozen(
    args: argparse.Namespace, seed: int, arms: Mapping[str, Iterable[Path]], out: Path, draws: int, **places: Any
) -> Command:
    """The read-out of some arms at one seed, of all draws at once."""
    drawn = ["--labelled", numbers(args.num_images), "--seeds", draws, "-s", f"eval.seed={SEED_STEP * seed}"]
    first, *others = arm_words(arms)
    return command_of("eval", first, "readout", *others, *masks_of(args, **places), *drawn, *READOUT, "--out", out)


def numbers(most: int) -> str:
    """The numbers of labelled scenes, as far as there are so many."""
    return ",".join(str(num) for num in LABELLED if num <= max(PRIMARY, most))


def table(args: argparse.Namespace, kind: str, name: str | int) -> Path:
    """Where a table is written as JSON."""
    path: Path = args.work / "tables" / kind / f"{name}.json"
    return path


def read_tables(args: argparse.Namespace, kind: str) -> Scores:
    """Scores of all tables of a kind; none where there are none."""
    return read_scores(sorted((args.work / "tables" / kind).glob("*.json")))


def tuning(args: argparse.Namespace, lr: float, steps: int | None = None, batch_size: int = 16) -> list[object]:
    """How backbone and head are trained: at one rate, without flips, since mirrored digits are none."""
    settings = [f"eval.tune.lr={lr:g}", "eval.tune.lr_grid=[]", f"eval.tune.batch_size={batch_size}"]
    words = [word for setting in settings for word in ("-s", setting)]
    return ["-c", "segment_small", "--steps", steps or args.steps, *words, "-s", "eval.tune.augment.flip=0"]
