"""Is it the teacher's training that helps, and do few labels help on top? Features, labels and both, distilled.

    python benchmarks/labels.py                              # all seeds; goes on where it was stopped
    python benchmarks/labels.py --seeds 2 --draws 1          # a look

Digit scenes of 64 px, resnet10t, foreground masks. Everything is a command of dtpipe; all are printed and kept in the
JSON. What was decided beforehand is `PROTOCOL`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from commands import Command, command_of, digit_scenes, run, with_seconds
from common import REPO, RESULTS, publish, teacher_digest
from scipy.stats import ttest_1samp

from dtpipe.distill.downstream.extractors import POSITION, RANDOM_INIT
from dtpipe.distill.downstream.paired import difference_of, paired_differences
from dtpipe.distill.downstream.result import FIXED, FOREGROUND_AP, HEAD

FEATURE, LABEL, MIX = "feature", "label", "mix"
UNTRAINED, MISMATCHED, MASKS = "untrained teacher", "mismatched pairs", "all masks"
PERMUTED = "masks of other scenes"
PRIMARY = 20
"""Labelled scenes of the contrasts, and those that the interpreter learns from."""
LABELLED = (PRIMARY, 80)
MAX_PIXELS = 20_000
"""Of the pixel classifiers that stand beside the interpreter."""
DRAW_STEP = 100
"""Seeds of labels of one draw lie this far from those of the next."""
PROTOCOL = {
    "arms": {
        FEATURE: "equation (3) on features of the trained teacher",
        LABEL: f"equation (5) on soft labels of an interpreter that learned from {PRIMARY} masks",
        MIX: "equation (6), both",
        RANDOM_INIT: "no pre-training",
        "teacher 1, teacher 2": "as feature, with teachers of other training seeds, where --teachers names them",
    },
    "controls": {
        MASKS: "the student fine-tuned on the masks of all scenes: must be better than random by more than 0.2 IoU",
        MISMATCHED: "images with the features of other images: must gain at most 0.02",
        UNTRAINED: "features of the teacher's network with weights as drawn",
        PERMUTED: f"the read-out learned from masks of other scenes: must give what {POSITION!r} gives",
    },
    "scores": {
        "frozen": "held-out foreground IoU of a linear read-out of all levels at one regularisation, and its AP",
        "tuned": "the same of UPerNet, backbone and head trained for 150 steps at one rate for all arms",
    },
    "seeds": "vary weights, order and noise of the pre-training; scores of the draws of labels are averaged in each. "
    "Contrasts with label and mix take the first draw alone, whose labels are those of the interpreter",
    "contrasts": {
        f"{FEATURE} - {RANDOM_INIT}, frozen": "expected +0.05 to +0.15",
        f"{FEATURE} - {UNTRAINED}, frozen": "expected +0.02 to +0.10: what the teacher's training adds",
        f"{LABEL} - {FEATURE}, frozen": "expected 0 to +0.05",
        f"{MIX} - {LABEL}, frozen": "expected 0 to +0.05",
        f"{FEATURE} - {RANDOM_INIT}, tuned": "expected +0.01 to +0.04: fine-tuned against scratch",
    },
    "verdict": "95 % intervals of differences paired by seed; p of Student's t, adjusted by Holm over the contrasts",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score everything, print and write what came out."""
    args = parse(argv)
    root = args.work
    digit_scenes(root, args.num_images, args.num_held_out)
    permute_masks(root / "train")
    commands = [*pretraining(args), *tables(args)]
    for command in commands:
        run(command, root)
    scores = {kind: read_scores(kind, args) for kind in ("frozen", "tuned")}
    content = {
        "protocol": PROTOCOL,
        "seeds": args.seeds,
        "draws": {"frozen": args.draws, "tuned": args.tuned_draws},
        "contrasts": contrasts(scores),
        "controls": controls(scores, args),
        "means": {kind: means(values) for kind, values in scores.items()},
        "interpreters": [interpreter_scores(root / f"head{seed}") for seed in range(args.seeds)],
        "scores": {kind: [asdict_of(key, value) for key, value in values.items()] for kind, values in scores.items()},
        "commands": with_seconds(commands, root),
    }
    teachers = {path.name: teacher_digest(path) for path in (args.teacher, *args.teachers)}
    publish("labels", content, args.out, teachers)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=REPO / "pipeline" / "demo" / "teacher")
    parser.add_argument("--teachers", type=Path, nargs="*", default=[], help="the same of other training seeds")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--draws", type=int, default=5, help="of labels, for the frozen read-out")
    parser.add_argument("--tuned-draws", type=int, default=2)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-held-out", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning")
    parser.add_argument("--lr", default="3e-3", help="of fine-tuning, fixed on other scenes")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-labels")
    parser.add_argument("--out", type=Path, default=RESULTS / "labels_digits.json")
    return parser.parse_args(argv)


def permute_masks(train: Path) -> None:
    """Beside the masks, the same under the names of other scenes."""
    out = train / "permuted"
    if out.exists():
        return
    masks = sorted((train / "semantic").rglob("*.png"))
    for mask, name in zip(masks, [*masks[1:], masks[0]], strict=True):
        place = out / name.relative_to(train / "semantic")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(mask.absolute())


# --- pre-training ----------------------------------------------------------------------------------------------------


def pretraining(args: argparse.Namespace) -> Iterator[Command]:
    """Features, interpreters, soft labels and students, seed by seed."""
    for seed in range(args.seeds):
        yield from features(seed, args)
        yield from labels(seed, args)
        yield from students(seed, args)
    yield all_masks(args)


def features(seed: int, args: argparse.Namespace) -> Iterator[Command]:
    """Of the teacher, of its network untrained, and of other teachers."""
    teachers = {"teacher": (args.teacher, []), "untrained": (args.teacher, ["--untrained", seed])}
    teachers |= {f"teacher{idx}": (path, []) for idx, path in enumerate(args.teachers, 1)}
    for name, (path, extra) in teachers.items():
        out, images = args.work / "features" / f"{name}{seed}", args.work / "train" / "images"
        noise = ["-s", f"extract.noise.seed={seed}", "-s", "extract.noise.timesteps=[50]"]
        places = ["--images", images, "--teacher", path, "--out", out]
        yield command_of("extract", "-c", "digits", *places, *noise, *extra, "--inline")


def labels(seed: int, args: argparse.Namespace) -> Iterator[Command]:
    """An interpreter on the scenes that seed's first draw labels, and its soft labels of all scenes."""
    source, head = args.work / "features" / f"teacher{seed}", args.work / f"head{seed}"
    drawn = ["--labelled", PRIMARY, "--seed", seed, "--flip", "never", "--out", head]
    yield command_of("interpret", source, *labelled(args), *drawn, "-s", f"interpret.rivals.max_pixels={MAX_PIXELS}")
    out = args.work / "features" / f"labels{seed}"
    yield command_of("extract", "--interpreter", head, "--from", source, "--out", out, "--inline")


def students(seed: int, args: argparse.Namespace) -> Iterator[Command]:
    """One of each arm."""
    folder = args.work / "features"
    only_labels = ["mse_weight=0", "at_weight=0"]
    joined = [folder / f"teacher{seed}", folder / f"labels{seed}", "--join"]
    arms: dict[str, list[Any]] = {
        FEATURE: [folder / f"teacher{seed}"],
        LABEL: [*joined, "-s", "distill.labels.weight=1", *(f"-sdistill.loss.{setting}" for setting in only_labels)],
        MIX: joined,
        UNTRAINED: [folder / f"untrained{seed}"],
        MISMATCHED: [folder / f"teacher{seed}", "--mismatch", seed],
    }
    arms |= {f"teacher {idx}": [folder / f"teacher{idx}{seed}"] for idx in range(1, 1 + len(args.teachers))}
    for name, words in arms.items():
        out = ["--seed", seed, "--epochs", args.epochs, "--out", run_of(name, seed, args)]
        yield command_of("distill", *words, "-c", "digits", *out)


def all_masks(args: argparse.Namespace) -> Command:
    """The control that must win: the student from scratch on every mask, which is the random arm of this table."""
    out = args.work / "tables" / "all_masks.json"
    runs = arm_words({FEATURE: 0}, args)
    return command_of("eval", *runs, "segment", *labelled(args), *tuned(args), "--labelled", "all", "--out", out)


def run_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of an arm's student."""
    if name == MASKS:
        return args.work / "tables" / "all_masks" / f"random-initialisation-{args.num_images}-{seed}"
    return args.work / name.replace(" ", "_") / str(seed)


# --- scores ----------------------------------------------------------------------------------------------------------


def tables(args: argparse.Namespace) -> Iterator[Command]:
    """Frozen and tuned, one command for each draw of labels, and the read-out of masks of other scenes."""
    names = [
        FEATURE,
        LABEL,
        MIX,
        UNTRAINED,
        MISMATCHED,
        *(f"teacher {idx}" for idx in range(1, 1 + len(args.teachers))),
    ]
    counts = ",".join(map(str, LABELLED))
    for kind, num_draws in (("frozen", args.draws), ("tuned", args.tuned_draws)):
        for draw in range(num_draws):
            out = ["--labelled", counts, "-s", f"eval.seed={DRAW_STEP * draw}", "--out", table_file(kind, draw, args)]
            arms = arm_words(dict.fromkeys([*names, MASKS] if kind == "frozen" else names, 0), args)
            task = ["readout"] if kind == "frozen" else ["segment", *tuned(args)]
            yield command_of("eval", *arms[:1], *task, *arms[1:], *labelled(args), *out)
    out = ["--labelled", PRIMARY, "--out", table_file("permuted", 0, args)]
    yield command_of("eval", *arm_words({FEATURE: 0}, args), "readout", *labelled(args, "permuted"), *out)


def arm_words(names: Mapping[str, int], args: argparse.Namespace) -> list[str]:
    """The first arm, then `--compare` of the others; each with a run for every seed."""
    written = [f"{name}=" + ",".join(str(run_of(name, seed, args)) for seed in range(args.seeds)) for name in names]
    return [written[0], *(word for arm in written[1:] for word in ("--compare", arm))]


def labelled(args: argparse.Namespace, masks: str = "semantic") -> list[str]:
    """Where labels are drawn from, and the held-out ones."""
    train, test = args.work / "train", args.work / "held_out"
    places = {"images": train / "images", "masks": train / masks}
    places |= {"test-images": test / "images", "test-masks": test / "semantic"}
    return [*(str(word) for name, place in places.items() for word in (f"--{name}", place)), "--foreground"]


def tuned(args: argparse.Namespace) -> list[str]:
    """How backbone and head are trained: at one rate, without flips, since mirrored digits are none."""
    settings = ["eval.tune.lr_grid=[]", f"eval.tune.lr={args.lr}", f"eval.tune.steps={args.steps}"]
    settings += ["eval.tune.augment.flip=0"]
    return ["-c", "segment_small", *(word for setting in settings for word in ("-s", setting))]


def table_file(kind: str, draw: int, args: argparse.Namespace) -> Path:
    """Where a table is written as JSON."""
    return args.work / "tables" / f"{kind}{draw}.json"


Scores = dict[tuple[str, int, int, str], list[float]]
"""(arm, number of labelled scenes, seed, score) to the values of the draws, the first one first."""


def read_scores(kind: str, args: argparse.Namespace) -> Scores:
    """The headline's scores of all draws."""
    scores: Scores = {}
    for draw in range(args.draws if kind == "frozen" else args.tuned_draws):
        document = json.loads(table_file(kind, draw, args).read_text())
        for score in document["scores"]:
            if score["level"] in (FIXED, HEAD):
                key = (score["extractor"], score["num_labelled"], score["seed"] - DRAW_STEP * draw)
                scores.setdefault((*key, "iou"), []).append(score["value"])
                scores.setdefault((*key, "ap"), []).append(score["others"].get(FOREGROUND_AP, float("nan")))
    return scores


def by_seed(scores: Scores, arm: str, num: int, first_draw: bool = False, name: str = "iou") -> dict[int, float]:
    """An arm's score of each seed: the mean of its draws, or the first."""
    return {
        seed: values[0] if first_draw else statistics.fmean(values)
        for (own, count, seed, score), values in scores.items()
        if (own, count, score) == (arm, num, name)
    }


def contrasts(scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """What the protocol asks, in its order, with p adjusted by Holm; then the same of AP and of more labels."""
    asked = [contrast(name, scores, PRIMARY, "iou") for name in PROTOCOL["contrasts"]]
    ranked = sorted(range(len(asked)), key=lambda idx: asked[idx]["p"])
    largest = 0.0
    for rank, idx in enumerate(ranked):
        largest = max(largest, min(1.0, (len(asked) - rank) * asked[idx]["p"]))
        asked[idx]["p_holm"] = largest
    more = [(num, score) for num in LABELLED for score in ("iou", "ap") if (num, score) != (PRIMARY, "iou")]
    return asked + [contrast(name, scores, num, score) for num, score in more for name in PROTOCOL["contrasts"]]


def contrast(name: str, scores: Mapping[str, Scores], num: int, score: str) -> dict[str, Any]:
    """One difference, paired by seed."""
    arms, _, kind = name.partition(", ")
    first, second = arms.split(" - ")
    with_labels = {first, second} & {LABEL, MIX} != set()
    one, other = (by_seed(scores[kind], arm, num, with_labels, score) for arm in (first, second))
    difference = difference_of(first, second, num, one, other)
    values = paired_differences(one, other)
    p = float(ttest_1samp(values, 0).pvalue) if len(values) > 1 else 1.0
    return {"contrast": name, "score": score, "expected": PROTOCOL["contrasts"][name], "p": p} | (
        asdict(difference) if difference else {}
    )


def controls(scores: Mapping[str, Scores], args: argparse.Namespace) -> dict[str, Any]:
    """Whether the protocol can see."""
    frozen = scores["frozen"]
    base = by_seed(frozen, RANDOM_INIT, PRIMARY)
    gains = {
        arm: difference_of(arm, RANDOM_INIT, PRIMARY, by_seed(frozen, arm, PRIMARY), base)
        for arm in (MASKS, MISMATCHED)
    }
    document = json.loads(table_file("permuted", 0, args).read_text())
    permuted = {
        arm: statistics.fmean(s["value"] for s in document["scores"] if (s["extractor"], s["level"]) == (arm, FIXED))
        for arm in (FEATURE, POSITION)
    }
    return {
        MASKS: {"gain": asdict_or_none(gains[MASKS]), "holds": gains[MASKS] is not None and gains[MASKS].mean > 0.2},
        MISMATCHED: {
            "gain": asdict_or_none(gains[MISMATCHED]),
            "holds": gains[MISMATCHED] is not None and gains[MISMATCHED].mean <= 0.02,
        },
        PERMUTED: permuted,
    }


def interpreter_scores(head: Path) -> Any:
    """Of the interpreter and its rivals, on held-out scenes."""
    return json.loads((head / "interpreter.json").read_text())["scores"]


def means(scores: Scores) -> dict[str, dict[str, float]]:
    """Mean over seeds and draws, and the deviation over seeds, by arm, labels and score."""
    found: dict[str, dict[str, float]] = {}
    for arm, num, score in dict.fromkeys((arm, num, score) for arm, num, _, score in scores):
        values = list(by_seed(scores, arm, num, name=score).values())
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        found[f"{arm}, {num} labelled, {score}"] = {"mean": statistics.fmean(values), "std": std, "n": len(values)}
    return found


def asdict_or_none(difference: Any) -> dict[str, Any] | None:
    """A record as plain values."""
    return None if difference is None else asdict(difference)


def asdict_of(key: tuple[str, int, int, str], values: Sequence[float]) -> dict[str, Any]:
    """One line of all scores."""
    arm, num, seed, score = key
    return {"arm": arm, "labelled": num, "seed": seed, "score": score, "draws": list(values)}


if __name__ == "__main__":
    sys.exit(main())
