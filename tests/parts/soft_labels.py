"""Soft labels without an interpreter: logits by arithmetic, in memory or as a dataset beside one of features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import LevelSpec
from dtpipe.manifests.soft_labels import interpreter_recipe, soft_label_name
from parts.memory import MemorySource, level_spec, write_dataset

CLASSES = ("background", "bright", "dark")
LABELS = level_spec("l3.labels", 8, len(CLASSES), role="soft_labels", tap="interpreter")
POOLED = LABELS.model_copy(update={"name": "l5.labels", "stride": 32, "height": 1, "width": 1})
HEAD = "cd" * 32


@dataclass
class Labelled(MemorySource):
    """Images of four squares, bright or dark, their features, and soft labels that say which a place is."""

    def image(self, row: int) -> np.ndarray:
        rng = np.random.default_rng([row, 0])
        squares = rng.choice([40, 160], (2, 2)).repeat(self.image_px[0] // 2, 0).repeat(self.image_px[1] // 2, 1)
        return (squares[..., None] + rng.integers(0, 50, (*self.image_px, 3))).astype(np.uint8)

    def features(self, level: LevelSpec, row: int, view: int = 0) -> np.ndarray:
        if level.role != "soft_labels":
            return super().features(level, row, view)
        image = self.image(row).mean(axis=-1)
        if self.views[view].flip:
            image = image[:, ::-1]
        cells = image.reshape(level.height, self.image_px[0] // level.height, level.width, -1).mean(axis=(1, 3))
        bright = (cells - 125) / 8
        return np.stack([np.zeros_like(bright), bright, -bright]).astype(level.dtype)


def write_labels(root: Path, source: MemorySource, features: Path | str, labels: LevelSpec = LABELS) -> Path:
    """The soft labels of a source as a dataset to join with that of its features."""
    assert labels.name == soft_label_name(labels.stride)
    manifest = FeatureDataset.open(features).manifest
    assert manifest is not None
    teacher = interpreter_recipe(HEAD, CLASSES, {"dataset": manifest.digest})
    soft = Labelled(source.num_rows, source.bad, source.views, (labels,), source.image_px)
    recorded = {"config": {"soft_labels": {"features": str(features)}}}
    return write_dataset(root, soft, provenance=recorded, teacher=teacher, images="joined")


def with_labels(source: MemorySource, labels: LevelSpec = LABELS) -> Labelled:
    """The source with a level of soft labels more."""
    return Labelled(source.num_rows, source.bad, source.views, (*source.levels, labels), source.image_px)
