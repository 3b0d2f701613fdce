"""Is it the teacher's training that helps, and do few labels help on top? Features, labels and both, distilled.

    python benchmarks/labels.py                          # goes on where it was stopped
    python benchmarks/labels.py --seeds 4 --add-to benchmarks/results/labels_digits.json     # four more seeds
    python benchmarks/labels.py --seeds 0 --add-to FILE  # no more seeds: what those of FILE say, reckoned anew
    python benchmarks/labels.py --part why               # after it: what was not expected in it
    python benchmarks/labels.py --part variants          # and what single settings of feature distillation do
    python benchmarks/labels.py --seeds 2 --draws 2 --label-draws 1 --tuned-draws 1 --num-images 64 --num-held-out 32 \
        --epochs 1 --steps 4 --pixel-models 1 --max-pixels 512 --num-teachers 0 --rate-seeds 1 --work DIR   # a look

Digit scenes of 64 px, resnet10t, foreground masks. Everything is a command of dtpipe; all are printed and kept in the
JSON. What was decided beforehand is `PROTOCOL`. The read-out is scored on cells of 4 px, all else on pixels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import label_variants
import label_why
from commands import Command, add_jobs, command_of, digit_scenes, run_groups, with_seconds
from common import REPO, RESULTS, publish, published, teacher_digest
from contrasts import IOU, SEED_STEP, means, read_scores
from label_arms import (
    BATCH,
    FEATURE,
    PER_DRAW,
    arm_words,
    extraction,
    features_of,
    frozen,
    labels,
    masks_of,
    numbers,
    run_of,
    seeds_of,
    student,
    table,
    tuning,
)
from label_protocol import DIGITS, FROZEN, MASKS, MISMATCHED, PERMUTED, RATES, SCRATCH, TUNED, UNTRAINED
from label_results import other_settings, results

from dtpipe.distill.downstream.extractors import RANDOM_INIT
from dtpipe.pipeline.demo.scenes import ScenePart, write_scenes

TEACHER_STEPS, TEACHER_IMAGES = 4200, 6000
"""As the demo's teacher was trained."""
STUDIES = {study.name: study for study in (label_variants.STUDY, label_why.STUDY)}
"""Smaller ones, after the main part."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score everything, print and write what came out."""
    args = parse(argv)
    write_data(args)
    if args.part in STUDIES:
        return STUDIES[args.part].report(args)
    earlier = earlier_result(args)
    commands = side_by_side(args, ([command] for command in teachers(args)))
    if earlier and earlier["origin"]["teacher_digests"] != digests(args):
        sys.exit(f"{args.add_to} is of other teachers; train those, or begin anew")
    commands += side_by_side(args, (pretraining(args, seed) for seed in seeds_of(args)))
    if earlier is None:
        commands += side_by_side(args, ([command] for command in rate_tables(args)))
    rates = earlier["rates"] if earlier else best_rates(args)
    commands += side_by_side(args, ([command] for command in tuned_tables(args, rates)))
    commands += side_by_side(args, ([command] for command in frozen_tables(args)))
    content = results(args, rates, with_seconds(commands, args.work), earlier)
    publish("labels", content, args.out / "labels_digits.json", digests(args))
    return 0


def earlier_result(args: argparse.Namespace) -> dict[str, Any] | None:
    """The one that seeds are added to; `args.first` becomes the next seed after it."""
    if args.add_to is None:
        return None
    document = published("labels", args.add_to)
    if why := other_settings(args, document):
        sys.exit(f"{args.add_to} cannot be added to: {why}")
    args.first = document["seeds"]
    return document


def side_by_side(args: argparse.Namespace, groups: Iterable[Iterable[Command]]) -> list[Command]:
    """Run groups of commands, `--jobs` at a time; all of them."""
    listed = [list(group) for group in groups]
    run_groups(listed, args.work, args.jobs)
    return [command for group in listed for command in group]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["main", *STUDIES], default="main")
    parser.add_argument("--teacher", type=Path, default=REPO / "pipeline" / "demo" / "teacher")
    parser.add_argument("--num-teachers", type=int, default=2, help="of other training seeds, trained here")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="of their training")
    parser.add_argument("--teacher-images", type=int, default=TEACHER_IMAGES)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--draws", type=int, default=5, help="of labels, for the frozen read-out")
    parser.add_argument("--label-draws", type=int, default=2, help="those with students of label and mix")
    parser.add_argument("--tuned-draws", type=int, default=2, help="those that are fine-tuned on: at most as many")
    parser.add_argument("--rate-seeds", type=int, default=2, help="of the tables that choose the rate of fine-tuning")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-held-out", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--long-epochs", type=int, default=60, help="of the variants of noise")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning")
    parser.add_argument("--pixel-models", type=int, default=10, help="of the ensemble beside the interpreter")
    parser.add_argument("--max-pixels", type=int, help="that they learn from; default: all, as published")
    add_jobs(parser)
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-labels")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--add-to", type=Path, help="result of earlier seeds; --seeds says how many more")
    args = parser.parse_args(argv)
    args.first = 0
    if args.seeds < 1 and args.add_to is None:
        parser.error("--seeds 0 needs --add-to: a result to reckon anew")
    if args.tuned_draws > args.label_draws or args.label_draws > args.draws:
        parser.error("--tuned-draws is at most --label-draws, and that at most --draws")
    return args


def write_data(args: argparse.Namespace) -> None:
    """Scenes to pre-train on, held-out ones, a few of those, others to choose rates on, and masks of other scenes."""
    root, num_other = args.work, max(50, args.num_images // 4)
    digit_scenes(root, args.num_images, args.num_held_out)
    parts: tuple[tuple[str, int, int, ScenePart], ...] = (("few", 8, 0, "held_out"), ("other", num_other, 1, "train"))
    for name, num, seed, part in parts:
        if not (root / name / "instances.json").is_file():
            write_scenes(root / name, num, seed=seed, part=part)
    permute_masks(root / "train")


def permute_masks(train: Path) -> None:
    """Beside the masks, the same under the names of other scenes."""
    out, masks = train / "permuted", sorted((train / "semantic").rglob("*.png"))
    for mask, name in zip(masks, [*masks[1:], masks[0]], strict=True):
        place = out / name.relative_to(train / "semantic")
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(mask.absolute())


# --- training --------------------------------------------------------------------------------------------------------


def teachers(args: argparse.Namespace) -> Iterator[Command]:
    """As the demo's, of other training seeds."""
    images = args.work / "teacher_scenes"
    missing = [idx for idx in range(1, 1 + args.num_teachers) if args.work in other_teacher(args, idx).parents]
    if missing and not (images / "instances.json").is_file():
        write_scenes(images, args.teacher_images, seed=0)
    settings = REPO / "pipeline" / "demo" / "teacher" / "train.yaml"
    for idx in missing:
        places = ["--images", images / "images", "--out", other_teacher(args, idx), "--steps", args.teacher_steps]
        decay = ["-s", f"train_teacher.run.decay_steps={min(700, args.teacher_steps)}"]
        no_grid = ["-s", "train_teacher.run.num_samples=1", "-s", "train_teacher.run.sample_steps=1"]
        seed = ["-s", f"train_teacher.seed={idx}"]
        yield command_of("train-teacher", "-c", settings, *places, *decay, *no_grid, *seed)


def other_teacher(args: argparse.Namespace, idx: int) -> Path:
    """The folder of a teacher of another training seed: the one that is kept, where its training is the same."""
    kept = REPO / "benchmarks" / "weights" / f"digits{idx}"
    folder: Path = args.work / "teachers" / str(idx)
    same = (args.teacher_steps, args.teacher_images) == (TEACHER_STEPS, TEACHER_IMAGES)
    return kept if same and kept.is_dir() else folder


def pretraining(args: argparse.Namespace, seed: int) -> Iterator[Command]:
    """Features, interpreters, soft labels and students of a seed."""
    yield extraction(args, "teacher", seed)
    yield extraction(args, "untrained", seed, "--untrained", seed)
    yield student(args, FEATURE, seed, features_of(args, "teacher", seed))
    yield student(args, UNTRAINED, seed, features_of(args, "untrained", seed))
    yield student(args, MISMATCHED, seed, features_of(args, "teacher", seed), "--mismatch", seed)
    for idx in range(1, 1 + args.num_teachers):
        yield extraction(args, f"teacher{idx}", seed, teacher=other_teacher(args, idx))
        yield student(args, f"teacher {idx}", seed, features_of(args, f"teacher{idx}", seed))
    for draw in range(args.label_draws):
        yield from labels(args, seed, draw)


def rate_tables(args: argparse.Namespace) -> Iterator[Command]:
    """Feature and scratch at each rate, on other scenes."""
    scenes = args.work / "other"
    places = ["--images", scenes / "images", "--masks", scenes / "semantic", "--foreground", "--test-share", 0.6]
    for lr in RATES:
        labelled = ["--labelled", numbers(args.num_images // 10), "--seeds", args.rate_seeds]
        out = ["--out", table(args, "rate", f"{lr:g}")]
        runs = arm_words({FEATURE: [run_of(args, FEATURE, 0)]})
        yield command_of("eval", *runs, "segment", *places, *labelled, *tuning(args, lr), *out)


def best_rates(args: argparse.Namespace) -> dict[str, Any]:
    """The rate of all arms, scratch's own, and what each scored on the other scenes."""
    tried = {lr: read_scores([table(args, "rate", f"{lr:g}")]) for lr in RATES}
    scored = {
        arm: {lr: statistics.fmean(line["mean"] for line in means(scores) if (line["arm"], line["score"]) == (arm, IOU))
              for lr, scores in tried.items()}
        for arm in (FEATURE, RANDOM_INIT)
    }  # fmt: skip
    both = {lr: sum(values[lr] for values in scored.values()) for lr in RATES}
    return {"all": max(both, key=both.__getitem__), "scratch": max(RATES, key=scored[RANDOM_INIT].__getitem__)} | {
        "tried": {arm: {f"{lr:g}": value for lr, value in values.items()} for arm, values in scored.items()}
    }


# --- scores ----------------------------------------------------------------------------------------------------------


def tuned_tables(args: argparse.Namespace, rates: dict[str, Any]) -> Iterator[Command]:
    """Every arm fine-tuned at one rate; scratch at its own, where that is another; one student on all masks."""
    draws = range(args.tuned_draws)
    for seed in seeds_of(args):
        arms = {name: [run_of(args, name, seed)] for name in (FEATURE, UNTRAINED)}
        arms |= {name: [run_of(args, name, seed, draw) for draw in draws] for name in PER_DRAW}
        yield tuned(args, seed, arms, rates["all"], TUNED)
        if rates["scratch"] != rates["all"]:
            yield tuned(args, seed, {FEATURE: arms[FEATURE]}, rates["scratch"], SCRATCH)
    if not args.seeds:
        return
    steps = args.epochs * -(-args.num_images // BATCH)
    words = [*masks_of(args), *tuning(args, rates["all"], steps, BATCH), "--labelled", "all", "--seeds", 1]
    yield command_of(
        "eval", run_of(args, FEATURE, args.first), "segment", *words, "--out", table(args, "all_masks", args.first)
    )


def tuned(
    args: argparse.Namespace, seed: int, arms: dict[str, list[Path]], lr: float, kind: str
) -> Command:  # fmt: skip
    """Arms of one seed, fine-tuned."""
    drawn = ["--labelled", numbers(args.num_images), "--seeds", args.tuned_draws, "-s", f"eval.seed={SEED_STEP * seed}"]
    first, *others = arm_words(arms)
    words = [*masks_of(args), *drawn, *tuning(args, lr), "--out", table(args, kind, seed)]
    return command_of("eval", first, "segment", *others, *words)


def frozen_tables(args: argparse.Namespace) -> Iterator[Command]:
    """Read-outs of every arm, seed by seed; of the digits themselves from one draw; of masks of other scenes."""
    all_masks = args.work / "tables" / "all_masks" / str(args.first) / f"random-initialisation-{args.num_images}-0"
    names = [FEATURE, UNTRAINED, MISMATCHED, *(f"teacher {idx}" for idx in range(1, 1 + args.num_teachers))]
    for seed in seeds_of(args):
        arms = {name: [run_of(args, name, seed)] for name in names} | {MASKS: [all_masks]}
        of_labels = {name: [run_of(args, name, seed, draw) for draw in range(args.label_draws)] for name in PER_DRAW}
        yield frozen(args, seed, {**arms, **of_labels} if args.label_draws == args.draws else arms,
                     table(args, FROZEN, seed), args.draws)  # fmt: skip
        if args.label_draws < args.draws:
            yield frozen(args, seed, of_labels, table(args, FROZEN, f"{seed}-labels"), args.label_draws)
        yield frozen(args, seed, arms, table(args, DIGITS, seed), 1, foreground=False)
    if args.first:
        return
    feature = {FEATURE: [run_of(args, FEATURE, 0)]}
    yield frozen(args, 0, feature, table(args, PERMUTED, 0), args.draws, masks="permuted")


def digests(args: argparse.Namespace) -> dict[str, str]:
    """Of all teachers that took part."""
    others = {f"teacher {idx}": teacher_digest(other_teacher(args, idx)) for idx in range(1, 1 + args.num_teachers)}
    return {"demo": teacher_digest(args.teacher), **others}


if __name__ == "__main__":
    sys.exit(main())
