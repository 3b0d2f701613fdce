"""Tiny training runs, what they leave behind, and whether two of them are equal."""

from __future__ import annotations

from pathlib import Path

import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.progress import OnTrainProgress
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.trainer import DistillResult, train
from dtpipe.manifests.read.source import FeatureSource

WITHOUT_BATCH_NORM = {
    "student": {"name": "test_convnext"},
    "regressor": {"width": 8, "norm": "group"},
    "micro_batch": 3,
    "log_every": 1,
}


class InMemory:
    """Data that is open already, as `TrainingData`."""

    def __init__(self, data: OpenedData) -> None:
        self._data = data

    def open(self, config: DistillConfig) -> OpenedData:
        return self._data

    open_checked = open

    def teacher(self, source: FeatureSource, device: torch.device) -> None:
        """All is read as it is stored."""


def train_on(data: OpenedData, config: DistillConfig, on_progress: OnTrainProgress | None = None) -> DistillResult:
    """`train` with data from memory."""
    return train(config, InMemory(data), on_progress)


def tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, child in items for name, tensor in tensors(child, f"{path}/{key}").items()}


def assert_equal_checkpoints(first: Path, second: Path, kind: str = "distill") -> None:
    one, other = tensors(load_checkpoint(first, kind)), tensors(load_checkpoint(second, kind))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(config: DistillConfig) -> list[float]:
    lines = read_metrics(Path(config.run.out))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
