"""Does distillation make better features? Frozen students against their rivals on images that nobody trained on.

For each seed: extract -> distill -> probe; then one table per data set and task, with few labels and all:
distilled, random initialisation, raw pixels, and the teacher's own features. Training on the labels, with a rate of its
own for each arm, is `dtpipe eval RUN finetune`.

    python benchmarks/probe.py --data digits                   # masks and classes of digit scenes
    python benchmarks/probe.py --data flowers --flowers DIR    # five classes of flowers, at 64 px
    python benchmarks/probe.py --data flowers --flowers-teacher taef2/ --flips --epochs 30 --lr 2e-3 \\
        --flowers-teacher-options '{"pool_missing": true}'     # the same with a published autoencoder as the teacher

Digit scenes are drawn by dtpipe; held-out ones use other digits and other parts of the photographs. Of the flowers a
fifth is held out by key, and a teacher is trained on the rest when none is given. Everything is kept under --work, so
the same command goes on where it was stopped; results are written after each seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import REPO, RESULTS, publish, teacher_digest

from dtpipe.distill.config import DistillConfig, DistillRun, StudentConfig
from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import (
    FeatureExtractor,
    PerSeed,
    random_initialisation,
    raw_pixels,
    student_extractor,
)
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.result import ProbeResult
from dtpipe.distill.student.load import load_student
from dtpipe.distill.teacher.config import TrainTeacherConfig, TrainTeacherRun
from dtpipe.distill.trainer import train
from dtpipe.extract.config import ExtractConfig, ExtractRun, NoiseConfig, TeacherConfig, TransformConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.run import run_extraction
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.demo.scenes import ScenePart, write_scenes
from dtpipe.pipeline.extractors import teacher_extractor
from dtpipe.pipeline.labelled import LabelledReader, open_labelled, split_by_key
from dtpipe.pipeline.train_teacher import train_teacher

PX = 64
TEST_SHARE = 0.2

Counts = tuple[int | None, ...]


@dataclass(frozen=True)
class TaskCase:
    """One table: a task, its sets and the numbers of labelled images."""

    name: str
    task: str
    train: LabelledSet
    test: LabelledSet
    num_labelled: Counts


@dataclass(frozen=True)
class Material:
    """One data set: the images that teacher and student see, its teacher, its tables."""

    name: str
    images: Path
    teacher: TeacherConfig
    cases: tuple[TaskCase, ...]
    flip: bool
    """Whether a mirrored image is still of its class."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the data sets asked for; print tables; write one JSON file each."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    say(
        f"work folder {args.work}, student {args.student}, {args.seeds} seeds, {args.epochs} epochs of batches of "
        f"{args.batch_size}"
    )
    prepare = {"digits": digits, "flowers": flowers}
    for name in prepare if args.data == "both" else [args.data]:
        material = prepare[name](args)
        if material is not None:
            measure(material, args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "flowers", "both"], default="both")
    parser.add_argument(
        "--flowers",
        type=Path,
        default=REPO.parent / "shared" / "data" / "flowers5_128",
        help="class folders of flowers",
    )
    parser.add_argument(
        "--teacher", type=Path, default=REPO / "pipeline" / "demo" / "teacher", help="teacher of the digit scenes"
    )
    parser.add_argument("--flowers-teacher", type=Path, help="teacher of the flowers; default: trained here")
    parser.add_argument(
        "--flowers-teacher-steps", type=int, default=10_000, help="steps of that training, batches of 32"
    )
    parser.add_argument("--flowers-teacher-options", type=json.loads, default={}, help="options of its family, as JSON")
    parser.add_argument(
        "--work", type=Path, default=REPO / "runs" / "benchmark-probe", help="datasets, runs and teachers"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-train", type=int, default=3000, help="scenes to distil, and to draw labels from")
    parser.add_argument("--num-test", type=int, default=1000, help="held-out scenes")
    parser.add_argument("--limit", type=int, help="use only so many flowers")
    parser.add_argument("--student", default="resnet10t", help="any timm model with features_only")
    parser.add_argument(
        "--flips", action="store_true", help="store mirrored views too, where a mirrored image keeps its class"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of distillation")
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument(
        "--mask-labels", type=counts, default=(5, 20, 80, None), help="labelled scenes with masks, e.g. 5,20,80,all"
    )
    parser.add_argument("--class-labels", type=counts, default=(50, 250, None), help="labelled images with classes")
    parser.add_argument(
        "--inline", action=argparse.BooleanOptionalAction, default=True, help="extract in this process, without Ray"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args(argv)


def counts(text: str) -> Counts:
    """`5,20,all` as numbers, None for all."""
    return tuple(None if part == "all" else int(part) for part in text.split(","))


def digits(args: argparse.Namespace) -> Material | None:
    """Digit scenes: foreground masks, and the main digit's class."""
    if not (args.teacher / "unet").is_dir() and not (args.teacher / "model_index.json").is_file():
        say(f"digits skipped: {args.teacher} holds no teacher; `make demo-teacher` trains one, or give --teacher")
        return None
    root = args.work / "digits"
    parts: tuple[tuple[ScenePart, int], ...] = (("train", args.num_train), ("held_out", args.num_test))
    labelled, test = (read_scenes(root, part, num, "semantic").foreground() for part, num in parts)
    train, held_out = (read_scenes(root, part, num) for part, num in parts)
    cases = (
        TaskCase("digits_foreground", "readout", labelled, test, args.mask_labels),
        TaskCase("digits_classes", "probe", train, held_out, args.class_labels),
        TaskCase("digits_classes_knn", "knn", train, held_out, args.class_labels),
    )
    return Material("digits", root / "train" / "images", TeacherConfig(path=str(args.teacher)), cases, flip=False)


def read_scenes(root: Path, part: ScenePart, num: int, masks: str | None = None) -> LabelledSet:
    """Scenes of one part with their digits as classes, or with a folder of masks; written first if missing."""
    folder = root / part
    if len(list((folder / "images").rglob("*.png"))) != num:
        say(f"writing {num} scenes to {folder}")
        write_scenes(folder, num, seed=0, px=PX, part=part)
    return read_labelled(folder / "images", folder / masks if masks else None, prefix=f"{part}/")


def read_labelled(images: Path, masks: Path | None, prefix: str) -> LabelledSet:
    """All images of class folders at 64 px, or with masks."""
    recipe = TransformRecipe(resize="center_crop", height=PX, width=PX)
    reader = LabelledReader(open_labelled(str(images), str(masks) if masks else None), recipe, str(images))
    return reader.select(range(len(reader.items)), say, prefix=prefix)


def flowers(args: argparse.Namespace) -> Material | None:
    """Flowers: five classes; a fifth of each class held out from everything."""
    if not args.flowers.is_dir():
        say(f"flowers skipped: {args.flowers} is not there; give their class folders with --flowers")
        return None
    root = args.work / "flowers"
    split_folders(args.flowers, root, args.limit)
    labelled, test = (read_labelled(root / part, None, f"{part}/") for part in ("train", "held_out"))
    path = args.flowers_teacher or flowers_teacher(root, args)
    teacher = TeacherConfig(path=str(path), options=args.flowers_teacher_options)
    cases = (
        TaskCase("flowers_classes", "probe", labelled, test, args.class_labels),
        TaskCase("flowers_classes_knn", "knn", labelled, test, args.class_labels),
    )
    return Material("flowers", root / "train", teacher, cases, flip=True)


def split_folders(source: Path, root: Path, limit: int | None) -> None:
    """Copy the images into train/ and held_out/, class folders kept, unless that is done already."""
    if (root / "split.done").is_file():
        return
    files = sorted(path for path in source.glob("*/*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    files = files[:: max(1, len(files) // limit)][:limit] if limit else files
    keys = [str(path.relative_to(source)) for path in files]
    parts = split_by_key(keys, [path.parent.name for path in files], TEST_SHARE, seed=0)
    for part, rows in zip(("train", "held_out"), parts, strict=True):
        for row in rows:
            target = root / part / keys[row]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[row], target)
    (root / "split.done").write_text(f"{len(parts[0])} train, {len(parts[1])} held out\n")
    say(f"flowers: {len(parts[0])} to train, {len(parts[1])} held out")


def flowers_teacher(root: Path, args: argparse.Namespace) -> Path:
    """A small DDPM trained on the training flowers; goes on where it was stopped."""
    config = TrainTeacherConfig(
        images=str(root / "train"),
        px=PX,
        channels=(16, 48, 96, 160, 160, 160),
        blocks=1,
        attention_strides=(8, 16),
        head_channels=32,
        norm_groups=16,
        precision="bfloat16",
        batch_size=32,
        lr=4e-4,
        ema_decay=0.999,
        run=TrainTeacherRun(
            out=str(root / "teacher"),
            steps=args.flowers_teacher_steps,
            sample_steps=50,
            threads=args.threads,
            device=args.device,
        ),
    )
    done = root / f"teacher.{config.run.steps}.done"
    if done.is_file():
        return Path(config.run.out)
    say(f"training the teacher of the flowers for {config.run.steps} steps in {config.run.out}")
    result = train_teacher(
        config, lambda progress: say(f"  step {progress.step}/{progress.num_steps}, loss {progress.losses['loss']:.4f}")
    )
    done.touch()
    return result.out


def measure(material: Material, args: argparse.Namespace) -> None:
    """All seeds of one data set; tables are printed and written after each."""
    results: dict[str, list[ProbeResult]] = {}
    timings = []
    for seed in range(args.seeds):
        run_dir, timing = distilled(material, seed, args)
        for case in material.cases:
            started = time.monotonic()
            results.setdefault(case.name, []).append(score(material, case, run_dir, seed, args))
            timing[f"{case.name}_s"] = round(time.monotonic() - started, 1)
        timings.append({"seed": seed, **timing})
        write(material, args, {name: ProbeResult.merge(parts) for name, parts in results.items()}, timings)


def distilled(material: Material, seed: int, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Extract and distil with one seed: the run folder, and where the time went."""
    root = args.work / material.name / f"seed{seed}"
    say(f"{material.name}, seed {seed}: extract")
    extracted = run_extraction(
        ExtractConfig(
            images=str(material.images),
            teacher=material.teacher,
            transform=TransformConfig(px=PX),
            noise=NoiseConfig(seed=seed, timesteps=(args.timestep,), flips=args.flips and material.flip),
            threads=args.threads,
            run=ExtractRun(out=str(root / "features"), inline=args.inline, device=args.device),
        )
    )
    say(
        f"{material.name}, seed {seed}: distil {args.student} on {extracted.num_ok} images, "
        f"{extracted.size_bytes / 1e6:.0f} MB"
    )
    run = train(
        DistillConfig(
            datasets=(extracted.url,),
            student=StudentConfig(name=args.student),
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=seed,
            run=DistillRun(out=str(root / "run"), device=args.device),
        ),
        on_progress=lambda progress: say(
            f"  step {progress.step}/{progress.num_steps}, loss {progress.losses['loss']:.4f}"
        ),
    )
    timing = {
        "extract_s": round(extracted.seconds, 1),
        "extract_img_s": round(extracted.throughput_img_s, 1),
        "extract_stages_s": extracted.stage_seconds,
        "distill_s": round(run.seconds, 1),
        "distill_img_s": round(run.throughput_img_s, 1),
        "distill_shares": run.shares,
        "distill_losses": run.losses,
    }
    return Path(run.run_dir), timing


def score(material: Material, case: TaskCase, run_dir: Path, seed: int, args: argparse.Namespace) -> ProbeResult:
    """One seed of one table."""
    device = pick_device(args.device)
    student = load_student(run_dir)
    extractors: list[FeatureExtractor | PerSeed] = [
        raw_pixels(),
        random_initialisation(student.spec, case.train, device=device),
        teacher_extractor(material.teacher, args.timestep, seed, device, (PX, PX)),
        student_extractor(student, device),
    ]
    label = f"{case.name}, seed {seed}: "
    config = ProbeConfig()
    return run_probe(case.task, extractors, case.train, case.test, case.num_labelled, [seed], config, prefixed(label))


def write(
    material: Material, args: argparse.Namespace, results: dict[str, ProbeResult], timings: list[dict[str, Any]]
) -> None:
    """Print the tables so far and write the JSON file."""
    for name, result in results.items():
        print(f"\n{name}\n{result.to_table()}", flush=True)
    results_json = {
        "data": material.name,
        "settings": {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS},
        "teacher_steps": trained_steps(Path(material.teacher.path)),
        "timings": timings,
        "results": {name: result.to_json() for name, result in results.items()},
    }
    digest = teacher_digest(material.teacher.path, material.teacher.options)
    publish("probe", results_json, args.out / f"probe_{material.name}.json", {material.name: digest})


def trained_steps(teacher: Path) -> int | None:
    """Training steps behind a teacher that `dtpipe train-teacher` made, else None."""
    record = teacher / "train.json"
    return int(json.loads(record.read_text(encoding="utf-8"))["step"]) if record.is_file() else None


NOT_SETTINGS = {"flowers", "teacher", "flowers_teacher", "flowers_teacher_steps", "work", "out"}
"""Where things lay says nothing about the result; the steps asked for are not those of a teacher that was given."""


def prefixed(label: str) -> Callable[[str], None]:
    """A progress callback that says where it is."""
    return lambda message: say(label + message)


def say(message: str) -> None:
    """Progress on stderr; tables alone go to stdout."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
