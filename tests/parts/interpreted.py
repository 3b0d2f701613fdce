"""Features in memory from which masks, or classes, can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtpipe.distill.labels.config import InterpreterConfig
from dtpipe.distill.labels.data import LabelledFeatures
from dtpipe.distill.labels.interpreter import InterpreterLevel
from parts.labelled import with_classes, with_masks
from parts.settings import build

LEVELS = (InterpreterLevel("l2", 4, 4), InterpreterLevel("l3", 8, 3))
PX = 16


def masks_of(num: int, seed: int, num_classes: int = 2) -> np.ndarray:
    """Masks of 4 px cells, the last row of pixels ignored. Shapes: -> (num, 16, 16) uint8."""
    generator = np.random.Generator(np.random.Philox(seed))
    masks = generator.integers(num_classes, size=(num, 4, 4), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    masks[:, -1] = 255
    return masks


def interpreted(num: int = 6, seed: int = 0, classes: bool = False, num_classes: int = 2) -> LabelledFeatures:
    """Images whose finest level tells the class of each cell through noise; flips are mirrored features."""
    masks = masks_of(num, seed, num_classes)
    images = (masks[..., None] * np.array([90, 60, 30])).clip(0, 255).astype(np.uint8)
    keys = [f"{seed}-{row}" for row in range(num)]
    labelled = with_classes(images, keys, np.arange(num) % 2) if classes else with_masks(images, keys, masks)

    def read(row: int, reading: int, flip: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + 10 * row + reading)
        fine, coarse = (torch.randn(count, side, side, generator=generator) for count, side in ((4, 4), (3, 2)))
        fine[1] *= 0.3
        fine[1] += row % 2 if classes else torch.from_numpy(masks[row, ::4, ::4].astype(np.float32))
        return {name: level.flip(-1) if flip else level for name, level in (("l2", fine), ("l3", coarse))}

    return LabelledFeatures(labelled, LEVELS, read, num_readings=2, flips=True)


def interpreter_config(out: Path, **changes: Any) -> InterpreterConfig:
    """A small training; `changes` replace fields, of `run` too."""
    fields = {"out": str(out), "width": 8, "epochs": 4, "warmup_epochs": 1, "device": "cpu", "log_every": 1}
    return build(InterpreterConfig, fields, **changes)
