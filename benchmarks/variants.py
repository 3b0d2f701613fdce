"""What single settings do, on digit scenes with the demo's teacher: regressor, loss, encoding, timestep, live encoding.

Each row is one change to the default run, which is FPN with PPM under MSE + AT on one stored draw: another regressor,
loss, encoding (stochastic or deterministic) or timestep, or a share of samples that the live teacher encodes anew
(reencode; 1 is the paper's own way). No row is a run of the paper: other data, students and bases. All rows share
scenes, seeds, initial weights, order and labelled images, so differences are paired: beside each mean stand the mean
and the deviation, over seeds, of the difference to the default. Scored by the foreground IoU of a linear read-out of
the frozen student, from few labelled scenes.

    python benchmarks/variants.py [--seeds 3] [--num-train 800] [--epochs 4] [--table regressor]

Everything is kept under --work: the same command goes on where it was stopped, and results are written after each row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import REPO, RESULTS, publish, refuse_to_lose, teacher_digest
from probe import PX, counts, read_scenes, say

from dtpipe.distill.config import DistillConfig, DistillRun, LossConfig, RegressorConfig, StudentConfig
from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import student_extractor
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.data import STORED, StoredData
from dtpipe.distill.student.load import load_student
from dtpipe.distill.trainer import train
from dtpipe.extract.config import ExtractConfig, ExtractRun, NoiseConfig, TeacherConfig, TransformConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.run import run_extraction
from dtpipe.pipeline.live.teacher import open_live

DEFAULT_T = 50


@dataclass(frozen=True)
class Variant:
    """A run: which features, and how they are distilled."""

    timestep: int = DEFAULT_T
    encoding: str = "stochastic"
    regressor: RegressorConfig = field(default_factory=RegressorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reencode: float = 0.0


TABLES: dict[str, dict[str, Variant]] = {
    "regressor": {
        kind: Variant(regressor=RegressorConfig(kind=kind)) for kind in ("fpn", "fpn_attention", "pafpn", "fpn_ppm")
    },
    "loss": {
        "mse": Variant(loss=LossConfig(at_weight=0)),
        "at": Variant(loss=LossConfig(mse_weight=0)),
        "mse + at": Variant(),
    },
    "encoding": {"stochastic": Variant(), "deterministic": Variant(encoding="ddim_inversion")},
    "timestep": {f"T = {timestep}": Variant(timestep=timestep) for timestep in (20, DEFAULT_T, 150, 250, 350)},
    "reencode": {f"p = {share:g}": Variant(reencode=share) for share in (0.0, 0.5, 1.0)},
}
"""Rows by what they change; the row that equals `Variant()` is the default that others are compared with."""


def features_of(variant: Variant, seed: int, args: argparse.Namespace) -> str:
    """The feature dataset that a row is distilled from; rows of equal encoding share it."""
    out = args.work / f"features-{variant.encoding}-{variant.timestep}-seed{seed}"
    config = ExtractConfig(
        images=str(args.work / "digits" / "train" / "images"),
        teacher=TeacherConfig(path=str(args.teacher), options={"encoding": variant.encoding}),
        transform=TransformConfig(px=PX),
        noise=NoiseConfig(seed=seed, timesteps=(variant.timestep,)),
        threads=args.threads,
        run=ExtractRun(out=str(out), inline=True, device=args.device),
    )
    return run_extraction(config).url


def distilled(name: str, variant: Variant, seed: int, args: argparse.Namespace) -> Path:
    """The run folder of one row and seed."""
    config = DistillConfig(
        datasets=(features_of(variant, seed, args),),
        student=StudentConfig(name=args.student),
        regressor=variant.regressor,
        loss=variant.loss,
        reencode=variant.reencode,
        flip=False,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=seed,
        run=DistillRun(out=str(args.work / f"run-{name}-seed{seed}"), log_every=5, device=args.device),
    )
    return Path(train(config, StoredData(partial(open_live, {})) if variant.reencode else STORED).run_dir)


def score(
    run_dir: Path, seed: int, sets: tuple[LabelledSet, LabelledSet], args: argparse.Namespace
) -> dict[str, float]:
    """Foreground IoU of the best level, by number of labelled scenes."""
    extractor = student_extractor(load_student(run_dir), pick_device(args.device))
    result = run_probe("readout", [extractor], *sets, args.labelled, [seed], ProbeConfig(), lambda _message: None)
    return {str(each.num_labelled): each.value for each in result.scores if each.best}


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rows of the tables asked for, seed by seed, so that each seed is whole before the next begins."""
    sets = (
        read_scenes(args.work / "digits", "train", args.num_train, "semantic").foreground(),
        read_scenes(args.work / "digits", "held_out", 1000, "semantic").foreground(),
    )
    kept = json.loads(args.kept.read_text()) if args.kept.exists() else {}
    for seed in range(args.seeds):
        for table in args.table or TABLES:
            for row, variant in TABLES[table].items():
                name = name_of(table, row, variant)
                if f"{name}/{seed}" not in kept:
                    started = time.monotonic()
                    kept[f"{name}/{seed}"] = score(distilled(name, variant, seed, args), seed, sets, args)
                    args.kept.write_text(json.dumps(kept, indent=1))
                    say(
                        f"table {table}, {row}, seed {seed}: {kept[f'{name}/{seed}']} "
                        f"in {time.monotonic() - started:.0f} s"
                    )
        publish_tables(kept, seed + 1, args)
    return kept


def publish_tables(kept: dict[str, dict[str, float]], num_seeds: int, args: argparse.Namespace) -> None:
    """Write the tables over the seeds that are whole."""
    tables: dict[str, Any] = {}
    for table in args.table or TABLES:
        for row, variant in TABLES[table].items():
            tables.setdefault(table, {})[row] = summarise(kept, name_of(table, row, variant), num_seeds)
    settings = {key: value for key, value in vars(args).items() if key not in ("work", "teacher", "out_json", "kept")}
    results = {
        "metric": "foreground IoU",
        "settings": settings,
        "tables": tables,
        "loss_curves": loss_curves(args) if "reencode" in tables else {},
    }
    publish("variants", results, args.out_json, {"demo": teacher_digest(args.teacher)})


def loss_curves(args: argparse.Namespace) -> dict[str, list[tuple[int, float]]]:
    """(step, mean loss since the entry before) of the first seed, by share of live samples."""
    runs = {
        row: args.work / f"run-{name_of('reencode', row, variant)}-seed0" for row, variant in TABLES["reencode"].items()
    }
    return {row: [(line["step"], round(line["loss"], 4)) for line in read_metrics(run)] for row, run in runs.items()}


def name_of(table: str, row: str, variant: Variant) -> str:
    """What a row's runs are called; rows that equal the default are one."""
    return "default" if variant == Variant() else f"{table}-{row.replace(' ', '')}"


def summarise(kept: dict[str, dict[str, float]], name: str, num_seeds: int) -> dict[str, Any]:
    """Mean and deviation of a row, and of its paired difference to the default, by number of labelled scenes."""
    found: dict[str, Any] = {}
    for labelled in kept[f"{name}/0"]:
        values = [kept[f"{name}/{seed}"][labelled] for seed in range(num_seeds)]
        base = [kept[f"default/{seed}"][labelled] for seed in range(num_seeds)]
        found[labelled] = {
            "iou": spread(values),
            "minus_default": spread([v - b for v, b in zip(values, base, strict=True)]),
        }
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample deviation, and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": round(statistics.mean(values), 4),
        "std": None if deviation is None else round(deviation, 4),
        "values": [round(v, 4) for v in values],
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", choices=list(TABLES), help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", type=Path, default=REPO / "pipeline" / "demo" / "teacher")
    parser.add_argument("--student", default="resnet10t")
    parser.add_argument("--num-train", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--labelled", type=counts, default=(20, 80), help="numbers of labelled scenes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-variants")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "variants.json")
    return parser.parse_args()


def main() -> int:
    """Run the rows that are missing; print and write the tables."""
    args = parse()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.kept = args.work / "scores.json"
    refuse_to_lose("variants", args.out_json, "tables", args.table or TABLES)
    measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
