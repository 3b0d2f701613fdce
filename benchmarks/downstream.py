"""Does it help? Backbones fine-tuned on few labels: distilled, distilled from an untrained teacher, and from scratch.

    python benchmarks/downstream.py --data digits                      # masks and objects of digit scenes, 64 px
    python benchmarks/downstream.py --data flowers --flowers DIR       # five classes of photographs, 64 px
    python benchmarks/downstream.py --data flowers --tables finetune --seeds 1 --add-to FILE   # one more seed

Everything is a command of dtpipe; all are printed and kept in the JSON. Each goes on where it was stopped, so this
does too, in the folder --work. What was decided beforehand is `PROTOCOL`: settings, arms and number of seeds were fixed
on other scenes (seed 100) before any seed that is reported was trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from commands import OBJECTS, Command, add_jobs, command_of, digit_scenes, run_groups, with_seconds
from common import REPO, RESULTS, publish, published, teacher_digest
from PIL import Image

from dtpipe.manifests.canonical import CHECKSUM, seal

STUDENT, PX = "resnet10t", 64
TEACHER, UNTRAINED = "distilled", "untrained"
UPRIGHT = ("-s", "eval.tune.augment.flip=0")
"""Mirrored digits are none."""
GRIDS = {
    "segment": "0.001,0.003,0.01,0.03",
    "detect": "0.001,0.003,0.01,0.03",
    "finetune": "0.0003,0.001,0.003,0.01",
}
"""Learning rates that each arm chooses from: wide enough that the best is not at an end."""
PROTOCOL = {
    "question": "Is a backbone distilled from a generative teacher, without labels, better to fine-tune than none?",
    "arms": {
        TEACHER: "the student of the trained teacher",
        UNTRAINED: "the control that must not win: the student of the same teacher with weights as drawn",
        "random initialisation": "the same student from scratch, on the same labels, by as many steps",
    },
    "seed": "varies noise, order and initial weights of the pre-training, the head, the labels drawn and their order",
    "rates": "chosen for each arm and number of labels on folds of the labelled images of the first seed",
    "score": "held-out images: other digits and parts of photographs, or a fifth of the flowers that no teacher saw",
    "verdict": "the 95 % interval of the difference paired by seed; the headline is distilled minus scratch",
}


@dataclass(frozen=True)
class Case:
    """One table."""

    name: str
    task: str
    labels: str
    """Numbers of labelled images."""
    settings: tuple[str, ...]
    """Of the command."""


@dataclass(frozen=True)
class Study:
    """Images, their teacher, and the tables."""

    name: str
    teacher: Path
    prepare: Callable[[argparse.Namespace, Path], None]
    images: Callable[[Path], Path]
    """Below the folder of the study."""
    extract: tuple[str, ...]
    distill: tuple[str, ...]
    cases: tuple[Case, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies asked for; print each table; write a JSON file for each."""
    args = parse(argv)
    for name in args.data:
        study = STUDIES[name]
        root = args.work / name
        if args.earlier:
            check_earlier(args, study)
        study.prepare(args, root)
        students = [command for seed in seeds_of(args) for command in pretraining(study, root, args, seed)]
        of_arms = [students[place : place + 2] for place in range(0, len(students), 2)]
        run_groups(of_arms, args.work, args.jobs)
        for case in chosen(study, args):
            evaluation = table(case, root, args)
            run_groups([[evaluation]] * args.jobs, args.work, args.jobs)  # which share its trainings
            report(study, case, root, args, [*students, evaluation])
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["digits", "flowers"], default=["digits", "flowers"])
    parser.add_argument("--tables", nargs="+", help="only these tables; default: all of the data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labelled", metavar="N,N", help="numbers of labelled images, in place of the study's")
    parser.add_argument("--flowers", type=Path, default=REPO.parent / "shared" / "data" / "flowers5_128")
    parser.add_argument(
        "--num-images", type=int, default=1000, help="scenes without labels; labels are drawn from them"
    )
    parser.add_argument("--num-held-out", type=int, default=300, help="scenes to score on")
    parser.add_argument("--epochs", type=int, help="of distillation, in place of the study's")
    parser.add_argument("--steps", type=int, help="of fine-tuning, in place of the preset's")
    add_jobs(parser)
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-downstream")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--add-to", type=Path, help="result of earlier seeds, of one table; --seeds says how many more")
    args = parser.parse_args(argv)
    args.earlier = published("downstream", args.add_to) if args.add_to else None
    if args.earlier:
        args.earlier["results"].pop(CHECKSUM, None)
    return args


def check_earlier(args: argparse.Namespace, study: Study) -> None:
    """End where seeds of this call cannot be added to those of the earlier result."""
    earlier, digests = args.earlier, {study.name: teacher_digest(study.teacher)}
    if (args.data, args.tables) != ([earlier["data"]], [earlier["results"]["task"]]):
        sys.exit(f"{args.add_to} is of --data {earlier['data']} --tables {earlier['results']['task']}")
    if (earlier["protocol"], earlier["origin"]["teacher_digests"]) != (PROTOCOL, digests):
        sys.exit(f"{args.add_to} has another protocol or teacher; begin anew")
    args.labelled = args.labelled or ",".join(map(str, earlier["results"]["config"]["labelled"]))


def seeds_of(args: argparse.Namespace) -> range:
    """The seeds of a call."""
    first = args.earlier["seeds"] if args.earlier else 0
    return range(first, first + args.seeds)


def digits(args: argparse.Namespace, root: Path) -> None:
    """Digit scenes."""
    digit_scenes(root, args.num_images, args.num_held_out, PX)


def flowers(args: argparse.Namespace, root: Path) -> None:
    """Class folders, a fifth held out as when the teacher was trained."""
    from probe import split_folders

    split_folders(args.flowers, root, None)
    leave_out_copies(root / "train", root / "held_out")


def leave_out_copies(train: Path, held_out: Path) -> None:
    """A photograph that is here under two names is not held out: `eval` refuses the folder otherwise."""
    known = {pixels(path) for path in train.glob("*/*")}
    for path in sorted(held_out.glob("*/*")):
        if pixels(path) in known:
            print(f"left out: {path.relative_to(held_out)} is among the training images", flush=True)
            path.unlink()


def pixels(path: Path) -> str:
    """What an image shows, whatever its name."""
    with Image.open(path) as image:
        return blake3(image.convert("RGB").tobytes()).hexdigest()


STUDIES = {
    "digits": Study(
        "digits",
        REPO / "pipeline" / "demo" / "teacher",
        digits,
        lambda root: root / "train" / "images",
        ("-c", "digits", "-s", "extract.noise.draws=4"),
        ("-c", "digits", "--epochs", "40", "--warmup-epochs", "4"),
        (
            Case("segment", "segment", "5,20,80", ("-c", "segment_small", *UPRIGHT)),
            Case("detect", "detect", "5,20,80", ("-c", "detect_small", *UPRIGHT)),
        ),
    ),
    "flowers": Study(
        "flowers",
        REPO / "benchmarks" / "weights" / "flowers64",
        flowers,
        lambda root: root / "train",
        ("-c", "digits", "-s", "extract.noise.draws=2", "-s", "extract.noise.flips=true"),
        ("-c", "digits", "--epochs", "12", "--warmup-epochs", "2"),
        (Case("finetune", "finetune", "25,50,250", ("-c", "finetune_small")),),
    ),
}


def pretraining(study: Study, root: Path, args: argparse.Namespace, seed: int) -> list[Command]:
    """Features and student of both teachers, at a seed."""
    commands = []
    epochs = ["--epochs", args.epochs, "--warmup-epochs", args.epochs / 10] if args.epochs else []
    for arm, untrained in ((TEACHER, []), (UNTRAINED, ["--untrained", seed])):
        features, student = root / "features" / f"{arm}{seed}", root / f"{arm}{seed}"
        places = ["--images", study.images(root), "--teacher", study.teacher, "--out", features]
        seeds = ["-s", f"extract.noise.seed={seed}", "-s", f"extract.source.seed={seed}"]
        commands.append(command_of("extract", *study.extract, *untrained, *seeds, *places, "--inline"))
        names = ["--student", STUDENT, "--seed", seed, "--out", student]
        commands.append(command_of("distill", features, *study.distill, *names, *epochs))
    return commands


def chosen(study: Study, args: argparse.Namespace) -> list[Case]:
    """The tables asked for."""
    return [case for case in study.cases if args.tables is None or case.name in args.tables]


def table(case: Case, root: Path, args: argparse.Namespace) -> list[str]:
    """The command of one table."""
    arms = {arm: ",".join(str(root / f"{arm}{seed}") for seed in seeds_of(args)) for arm in (TEACHER, UNTRAINED)}
    steps = ["--steps", str(args.steps)] if args.steps else []
    rates = ["--lr-grid", GRIDS[case.task], "-s", "eval.tune.lr_choice=first_seed", "-s", "eval.tune.folds=2"]
    labels = [*images_of(case.task, root), "--labelled", args.labelled or case.labels, "--seeds", str(args.seeds)]
    out = ["--out", str(result_file(case, root))]
    arms_given = [f"{TEACHER}={arms[TEACHER]}", case.task, "--compare", f"{UNTRAINED}={arms[UNTRAINED]}"]
    added = []
    if args.earlier:
        earlier = root / "tables" / "earlier.json"
        earlier.parent.mkdir(exist_ok=True)
        earlier.write_bytes(seal(args.earlier["results"]))
        added = ["--add-to", str(earlier), "-s", f"eval.seed={seeds_of(args).start}"]
    return ["eval", *arms_given, *labels, *case.settings, *rates, *steps, *added, *out]


def images_of(task: str, root: Path) -> list[str]:
    """Labelled and held-out images, as the task needs them."""
    train, test = root / "train", root / "held_out"
    if task == "finetune":
        return ["--images", str(train), "--test-images", str(test)]
    if task == "detect":
        return ["--images", f"coco-json:{train}@{OBJECTS}", "--test-images", f"coco-json:{test}@{OBJECTS}"]
    masks = ["--masks", str(train / "semantic"), "--test-masks", str(test / "semantic")]
    return ["--images", str(train / "images"), "--test-images", str(test / "images"), *masks, "--foreground"]


def result_file(case: Case, root: Path) -> Path:
    """Where the table is written as JSON."""
    return root / "tables" / f"{case.name}.json"


def report(study: Study, case: Case, root: Path, args: argparse.Namespace, commands: Sequence[Sequence[str]]) -> None:
    """Write what came out, with all that it takes to make it again."""
    found = json.loads(result_file(case, root).read_text(encoding="utf-8").replace(str(args.work), "WORK"))
    found.pop(CHECKSUM)  # of the file, with its paths
    earlier = args.earlier
    content = {
        "data": study.name,
        "protocol": PROTOCOL,
        "seeds": seeds_of(args).stop,
        "commands": [*(earlier["commands"] if earlier else ()), *with_seconds(commands, args.work)],
        "results": found,
        "earlier": [*earlier.get("earlier", ()), earlier["origin"]] if earlier else [],
    }
    digests = {study.name: teacher_digest(study.teacher)}
    publish("downstream", content, args.out / f"downstream_{case.name}.json", digests)


if __name__ == "__main__":
    sys.exit(main())
