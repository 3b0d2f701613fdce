"""Interpreters with drawn weights, and soft labels of small extractions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtpipe.distill.labels.files import load_interpreter, save_interpreter
from dtpipe.distill.labels.interpreter import FeatureInterpreter, InterpreterLevel, InterpreterSpec, views_in_channels
from dtpipe.extract.config import ExtractConfig, ExtractRun
from dtpipe.manifests.labels import ClassTable
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import LevelSpec, StrictModel
from dtpipe.pipeline.soft_labels.config import CachedConfig, SoftLabelConfig

CLASSES = ("sky", "sea", "land", "boat")


def write_interpreter(folder: Path, levels: Sequence[LevelSpec], seed: int = 0, /, **changes: Any) -> str:
    """A head of four classes with drawn weights, for levels of a dataset; `record` is what it says of itself, `images`
    are those that had labels."""
    torch.manual_seed(seed)
    record, images = changes.pop("record", {}), changes.pop("images", None)
    read = tuple(InterpreterLevel(level.name, level.stride, level.channels) for level in levels)
    fields = {"levels": read, "classes": ClassTable(CLASSES), "width": 8} | changes
    network = FeatureInterpreter(InterpreterSpec(**fields))
    torch.nn.init.normal_(network.classifier.weight, std=2.0)
    save_interpreter(network, record, folder, images)
    return str(folder)


class LabelSettings(StrictModel):
    """Soft labels of stored features, or of a teacher that runs, as a settings document has them."""

    extract: CachedConfig | ExtractConfig
    soft_labels: SoftLabelConfig

    @property
    def run(self) -> ExtractRun:
        """As settings of an extraction have it."""
        return self.extract.run


def label_settings(head: str, features: str, out: Path, **shard: Any) -> LabelSettings:
    """Settings of an inline run in shards of three rows."""
    run = {"out": str(out), "inline": True, "device": "cpu", "lock_stale_s": 1}
    extract = {"shard": {"samples": 3, **shard}, "batch_size": 3, "run": run}
    fields = {"extract": extract, "soft_labels": {"interpreter": head, "features": features}}
    return LabelSettings.model_validate(fields)


@torch.inference_mode()
def logits_of(head: str, dataset: FeatureDataset, row: int, views: Sequence[int]) -> np.ndarray:
    """One sample's logits by itself, of views read together. Shapes: -> [K, h, w] float32."""
    network = load_interpreter(head).network
    levels = {
        level.name: [torch.from_numpy(read_level(dataset, level.name, row, view).copy())[None] for view in views]
        for level in network.spec.levels
    }
    values: np.ndarray = network(views_in_channels(levels))[0].numpy()
    return values
