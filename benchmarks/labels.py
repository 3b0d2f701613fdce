"""Is it the teacher's training that helps, and do few labels help on top? Features, labels and both, distilled.

    python benchmarks/labels.py                          # goes on where it was stopped
    python benchmarks/labels.py --part variants          # after it: what single settings of feature distillation do
    python benchmarks/labels.py --seeds 2 --draws 2 --label-draws 1 --tuned-draws 1 --num-images 64 --num-held-out 32 \
        --epochs 1 --steps 4 --pixel-models 1 --max-pixels 512 --num-teachers 0 --rate-seeds 1 --work DIR   # a look

Digit scenes of 64 px, resnet10t, foreground masks. Everything is a command of dtpipe; all are printed and kept in the
JSON. What was decided beforehand is `PROTOCOL`. The read-out is scored on cells of 4 px, all else on pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import label_variants
import numpy as np
from commands import Command, add_jobs, command_of, digit_scenes, run_groups, with_seconds
from common import REPO, RESULTS, publish, teacher_digest
from contrasts import AP, IOU, SEED_STEP, Question, Scores, answered, compared, means, plain, read_scores
from label_arms import (
    BATCH,
    FEATURE,
    LABEL,
    LABELLED,
    MIX,
    PER_DRAW,
    PRIMARY,
    arm_words,
    extraction,
    features_of,
    frozen,
    head_of,
    labels,
    masks_of,
    numbers,
    read_tables,
    run_of,
    student,
    table,
    tuning,
)
from PIL import Image

from dtpipe.distill.downstream.extractors import PATCHES, POSITION, RANDOM_INIT
from dtpipe.pipeline.demo.scenes import write_scenes

UNTRAINED, MISMATCHED, MASKS = "untrained teacher", "mismatched pairs", "all masks"
FROZEN, TUNED = "frozen", "tuned"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
QUESTIONS = (
    Question("feature - random, frozen", FEATURE, RANDOM_INIT, FROZEN, "+0.05 to +0.15"),
    Question(
        "feature - untrained teacher, frozen", FEATURE, UNTRAINED, FROZEN, "+0.02 to +0.10: the teacher's training"
    ),
    Question("label - feature, frozen", LABEL, FEATURE, FROZEN, "0 to +0.05"),
    Question("mix - label, frozen", MIX, LABEL, FROZEN, "0 to +0.05"),
    Question("feature - scratch, tuned", FEATURE, RANDOM_INIT, TUNED, "+0.01 to +0.04"),
)
PROTOCOL = {
    "arms": {
        FEATURE: "equation (3) on features of the trained teacher",
        LABEL: f"equation (5) on soft labels of an interpreter that learned from {PRIMARY} masks; fine-tuned with its "
        "decoder, as appendix G.4 does",
        MIX: "equation (6), both; fine-tuned as label",
        RANDOM_INIT: "no pre-training",
        UNTRAINED: "as feature, from the teacher's network with weights as drawn",
        "teacher 1, teacher 2": "as feature, with teachers of other training seeds",
    },
    "controls": {
        MASKS: "a student that learned the masks of all scenes, by as many steps: must beat random by over 0.2 IoU",
        MISMATCHED: "images with the features of other images: must gain at most 0.02 IoU on random",
        "masks of other scenes": f"read-outs that learned them must not beat {POSITION!r}, which learned them too, by "
        "0.02 in AP; IoU goes by how much is guessed, and is shown",
    },
    "scores": {
        FROZEN: "held-out foreground IoU of a linear read-out of all levels at one regularisation, on cells of 4 px",
        TUNED: "the same, on pixels, of UPerNet, backbone and head trained on the labels",
    },
    "rates": "distillation: 4e-3, the paper's. Fine-tuning: one for all arms, the best mean of feature and scratch on "
    "other scenes with labels of their own; scratch's own best stands beside it",
    "seeds": "vary weights, order and noise of pre-training; in each, scores of several draws of labels are averaged; "
    "of label and mix each draw has an interpreter and students of its own, and contrasts take the draws of both arms",
    "contrasts": {question.name: f"expected {question.expected}" for question in QUESTIONS},
    "primary": f"IoU from {PRIMARY} labelled scenes; {LABELLED[-1]} and AP stand beside it. Interpreters learn from "
    f"{PRIMARY} everywhere",
    "verdict": "95 % intervals of differences paired by seed; p of Student's t, adjusted by Holm over the contrasts",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score everything, print and write what came out."""
    args = parse(argv)
    write_data(args)
    if args.part == "variants":
        return label_variants.report(args)
    commands = side_by_side(args, ([command] for command in teachers(args)))
    commands += side_by_side(args, (pretraining(args, seed) for seed in range(args.seeds)))
    commands += side_by_side(args, ([command] for command in rate_tables(args)))
    rates = best_rates(args)
    commands += side_by_side(args, ([command] for command in tuned_tables(args, rates)))
    commands += side_by_side(args, ([command] for command in frozen_tables(args)))
    publish("labels", results(args, rates, commands), args.out / "labels_digits.json", digests(args))
    return 0


def side_by_side(args: argparse.Namespace, groups: Iterable[Iterable[Command]]) -> list[Command]:
    """Run groups of commands, `--jobs` at a time; all of them."""
    listed = [list(group) for group in groups]
    run_groups(listed, args.work, args.jobs)
    return [command for group in listed for command in group]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["main", "variants"], default="main")
    parser.add_argument("--teacher", type=Path, default=REPO / "pipeline" / "demo" / "teacher")
    parser.add_argument("--num-teachers", type=int, default=2, help="of other training seeds, trained here")
    parser.add_argument("--teacher-steps", type=int, default=4200, help="of their training")
    parser.add_argument("--teacher-images", type=int, default=6000)
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
    args = parser.parse_args(argv)
    if args.tuned_draws > args.label_draws or args.label_draws > args.draws:
        parser.error("--tuned-draws is at most --label-draws, and that at most --draws")
    return args


def write_data(args: argparse.Namespace) -> None:
    """Scenes to pre-train on, held-out ones, a few of those, others to choose rates on, and masks of other scenes."""
    root, num_other = args.work, max(50, args.num_images // 4)
    digit_scenes(root, args.num_images, args.num_held_out)
    for name, num, seed, part in (("few", 8, 0, "held_out"), ("other", num_other, 1, "train")):
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
    if args.num_teachers and not (images / "instances.json").is_file():
        write_scenes(images, args.teacher_images, seed=0)
    settings = REPO / "pipeline" / "demo" / "teacher" / "train.yaml"
    for idx in range(1, 1 + args.num_teachers):
        places = ["--images", images / "images", "--out", other_teacher(args, idx), "--steps", args.teacher_steps]
        decay = ["-s", f"train_teacher.run.decay_steps={min(700, args.teacher_steps)}"]
        no_grid = ["-s", "train_teacher.run.num_samples=1", "-s", "train_teacher.run.sample_steps=1"]
        seed = ["-s", f"train_teacher.seed={idx}"]
        yield command_of("train-teacher", "-c", settings, *places, *decay, *no_grid, *seed)


def other_teacher(args: argparse.Namespace, idx: int) -> Path:
    """The folder of a teacher of another training seed."""
    folder: Path = args.work / "teachers" / str(idx)
    return folder


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
    for seed in range(args.seeds):
        arms = {name: [run_of(args, name, seed)] for name in (FEATURE, UNTRAINED)}
        arms |= {name: [run_of(args, name, seed, draw) for draw in draws] for name in PER_DRAW}
        yield tuned(args, seed, arms, rates["all"], TUNED)
        if rates["scratch"] != rates["all"]:
            yield tuned(args, seed, {FEATURE: arms[FEATURE]}, rates["scratch"], "scratch")
    steps = args.epochs * -(-args.num_images // BATCH)
    words = [*masks_of(args), *tuning(args, rates["all"], steps, BATCH), "--labelled", "all", "--seeds", 1]
    yield command_of("eval", run_of(args, FEATURE, 0), "segment", *words, "--out", table(args, "all_masks", 0))


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
    all_masks = args.work / "tables" / "all_masks" / "0" / f"random-initialisation-{args.num_images}-0"
    names = [FEATURE, UNTRAINED, MISMATCHED, *(f"teacher {idx}" for idx in range(1, 1 + args.num_teachers))]
    for seed in range(args.seeds):
        arms = {name: [run_of(args, name, seed)] for name in names} | {MASKS: [all_masks]}
        of_labels = {name: [run_of(args, name, seed, draw) for draw in range(args.label_draws)] for name in PER_DRAW}
        yield frozen(args, seed, {**arms, **of_labels} if args.label_draws == args.draws else arms,
                     table(args, FROZEN, seed), args.draws)  # fmt: skip
        if args.label_draws < args.draws:
            yield frozen(args, seed, of_labels, table(args, FROZEN, f"{seed}-labels"), args.label_draws)
        yield frozen(args, seed, arms, table(args, "digits", seed), 1, foreground=False)
    feature = {FEATURE: [run_of(args, FEATURE, 0)]}
    yield frozen(args, 0, feature, table(args, "permuted", 0), args.draws, masks="permuted")


def results(args: argparse.Namespace, rates: dict[str, Any], commands: Iterable[Command]) -> dict[str, Any]:
    """What came out: the contrasts first."""
    scores = {kind: read_tables(args, kind) for kind in (FROZEN, TUNED)}
    beside = [(num, score) for num in LABELLED for score in (IOU, AP) if (num, score) != (PRIMARY, IOU)]
    scratch = read_tables(args, "scratch") or scores[TUNED]
    draws = {FROZEN: args.draws, "of label and mix": args.label_draws, TUNED: args.tuned_draws}
    return {
        "protocol": PROTOCOL,
        "seeds": args.seeds,
        "draws": draws,
        "rates": rates,
        "contrasts": answered(QUESTIONS, scores, PRIMARY, IOU),
        "beside": [line for num, score in beside for line in answered(QUESTIONS, scores, num, score)],
        "feature - scratch at its own rate": [
            {"labelled": num, **compared(scores[TUNED], FEATURE, RANDOM_INIT, num, IOU, scratch)} for num in LABELLED
        ],
        "teachers": [
            {"contrast": f"teacher {idx} - {FEATURE}", **compared(scores[FROZEN], f"teacher {idx}", FEATURE, PRIMARY)}
            for idx in range(1, 1 + args.num_teachers)
        ],
        "controls": controls(scores[FROZEN], read_tables(args, "permuted"), foreground_share(args)),
        "references": references(args, scratch),
        "means": {kind: means(values) for kind, values in (*scores.items(), ("digits", read_tables(args, "digits")))},
        "scores": {kind: plain(values) for kind, values in scores.items()},
        "commands": with_seconds(commands, args.work),
    }


def controls(scores: Scores, permuted: Scores, share: float) -> dict[str, Any]:
    """Whether the protocol can see. Each says what was found, and whether it holds."""
    gains = {arm: compared(scores, arm, RANDOM_INIT, PRIMARY) for arm in (MASKS, MISMATCHED)}
    beyond = compared(permuted, FEATURE, POSITION, PRIMARY, AP)["mean"]
    values = {
        f"{arm}, {score}": line for arm in (FEATURE, POSITION, PATCHES) for line in means(permuted)
        for score in (line["score"],) if (line["arm"], line["labelled"]) == (arm, PRIMARY)
    }  # fmt: skip
    return {
        MASKS: {"gain": gains[MASKS], "holds": gains[MASKS]["mean"] > 0.2},
        MISMATCHED: {"gain": gains[MISMATCHED], "holds": gains[MISMATCHED]["mean"] <= 0.02},
        "masks of other scenes": {
            "values": {name: line["mean"] for name, line in values.items()},
            "share of the foreground": share,
            "holds": beyond <= 0.02,
        },
    }


def foreground_share(args: argparse.Namespace) -> float:
    """Of the pixels of held-out scenes."""
    masks = sorted((args.work / "held_out" / "semantic").rglob("*.png"))
    return statistics.fmean(float((np.asarray(Image.open(mask)) > 0).mean()) for mask in masks)


def references(args: argparse.Namespace, scratch: Scores) -> dict[str, Any]:
    """Interpreters and their rivals, foreground IoU on pixels and AP; scratch at its own best rate.

    Teacher, patches and position stand in the frozen tables.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        document = json.loads((head_of(args, seed, 0) / "interpreter.json").read_text(encoding="utf-8"))
        for arm, record in document["scores"].items():
            found.setdefault(arm, []).append(record["others"])
    mean = {
        arm: {name: statistics.fmean(line[name] for line in of_arm) for name in of_arm[0]}
        for arm, of_arm in found.items()
    }
    return {**mean, "scratch": [line for line in means(scratch) if line["arm"] == RANDOM_INIT]}


def digests(args: argparse.Namespace) -> dict[str, str]:
    """Of all teachers that took part."""
    others = {f"teacher {idx}": teacher_digest(other_teacher(args, idx)) for idx in range(1, 1 + args.num_teachers)}
    return {"demo": teacher_digest(args.teacher), **others}


if __name__ == "__main__":
    sys.exit(main())
