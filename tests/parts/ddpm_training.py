"""A tiny training of a teacher, with what `pipeline` hands to it replaced by arrays in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtpipe.distill.engine.progress import OnTrainProgress
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.data import TrainImages
from dtpipe.distill.teacher.trainer import TrainTeacherResult, train_ddpm
from parts.paths import REPO
from parts.settings import build

FIXTURES = REPO / "tests" / "distill" / "teacher" / "fixtures"
TINY = json.loads((FIXTURES / "tiny.json").read_text())


def tiny_teacher(out: Path | str = "nowhere", **changes: object) -> TrainTeacherConfig:
    """A network that trains in a second: six steps of three images of 16 px."""
    return build(TrainTeacherConfig, TINY | {"images": "memory", "out": str(out)}, **changes)


def in_memory(pixels: np.ndarray, labels: np.ndarray | None = None, classes: tuple[str, ...] = ()) -> TrainImages:
    return TrainImages(pixels, tuple(f"{row}.png" for row in range(len(pixels))), labels, classes)


def numbered(num: int, px: int = 16) -> TrainImages:
    """Images whose every value is their number."""
    return in_memory(np.arange(num, dtype=np.uint8)[:, None, None, None] * np.ones((1, px, px, 3), np.uint8))


def noise_images(config: TrainTeacherConfig, num: int = 8) -> TrainImages:
    """Random images, of two classes by turns where classes are asked for."""
    pixels = np.random.Generator(np.random.Philox(7)).integers(0, 256, (num, *config.image_px, 3), dtype=np.uint8)
    return in_memory(pixels, np.arange(num) % 2, ("cat", "dog")) if config.class_conditional else in_memory(pixels)


def train(
    config: TrainTeacherConfig,
    images: TrainImages | None = None,
    on_progress: OnTrainProgress | None = None,
    start_from: Any = None,
) -> TrainTeacherResult:
    """`train_ddpm` on images in memory, with a grid of grey samples."""
    return train_ddpm(config, lambda *_: images or noise_images(config), start_from, draw_grey, on_progress)


def draw_grey(config: TrainTeacherConfig, folder: Path, num_classes: int, device: torch.device) -> np.ndarray:
    assert (folder / "unet" / "config.json").exists()
    return np.full((config.run.num_samples, *config.image_px, 3), 100 + num_classes, np.uint8)
