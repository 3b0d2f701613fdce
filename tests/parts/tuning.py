"""A tiny training of a tuned task: bright halves of noise, upper (class 0) or lower (class 1), as classes or masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dtpipe.distill.downstream.extractors import random_student
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.distill.engine.checkpoint import save_checkpoint
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.student.student import Student, StudentSpec, spec_to_dict
from parts.images import png, write_files
from parts.labelled import with_classes, with_masks

STUDENT = StudentSpec("test_resnet", 4, (32, 32))
RUN = {"log_every": 1, "save_every": 2, "workers": 0}


def bright_halves(num: int, seed: int, masked: bool = False, px: int = 32) -> LabelledSet:
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 2
    pixels = rng.integers(0, 100, (num, px, px, 3))
    masks = np.zeros((num, px, px), np.uint8)
    for idx, label in enumerate(labels):
        masks[idx, px // 2 * label : px // 2 * (label + 1)] = 1
    pixels += 120 * masks[..., None]
    images, keys = pixels.astype(np.uint8), [f"{seed}/{idx}" for idx in range(num)]
    return with_masks(images, keys, masks) if masked else with_classes(images, keys, labels)


def tune_config(**changes: Any) -> TuneConfig:
    """Six steps of four images; changes of `run` are added to those of these tests."""
    run = {**RUN, **changes.pop("run", {})}
    return TuneConfig.model_validate({"steps": 6, "batch_size": 4, "lr": 3e-3, **changes, "run": run})


def tune_job(
    config: TuneConfig,
    labelled: LabelledSet | None = None,
    task: str | TunedTask[Any] = "finetune",
    student: Student | None = None,
    seed: int = 0,
) -> TuneJob:
    task = find_tuned(task) if isinstance(task, str) else task
    return TuneJob(task, student or random_student(STUDENT, 0), labelled or bright_halves(6, 0), config, seed)


def tune_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def write_run(folder: Path, seed: int = 0, spec: StudentSpec = STUDENT) -> Path:
    """A run of `dtpipe distill`, as far as loading its student goes."""
    student = random_student(spec, seed)
    folder.mkdir(parents=True, exist_ok=True)
    state = {"student_spec": spec_to_dict(spec), "student": student.state_dict(), "ema": None}
    save_checkpoint(folder / "last.pt", "distill", state)
    return folder


def write_halves(root: Path, num: int, seed: int = 0) -> Path:
    """Bright halves in class folders `down` (class 0 here, the upper half) and `up`."""
    labelled = bright_halves(num, seed)
    names = ("down", "up")
    files = {f"{names[idx % 2]}/{idx}.png": png(labelled.image(idx)) for idx in range(num)}
    return write_files(root, files)
