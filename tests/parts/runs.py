"""Tiny training runs, what they leave behind, and whether two of them are equal."""

from __future__ import annotations

from pathlib import Path

import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.progress import RunResult
from dtpipe.distill.engine.run_folder import RunFolder, read_metrics
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.trainer import Trainer, run
from dtpipe.manifests.stopping import StopRequest

WITHOUT_BATCH_NORM = {
    "student": {"name": "test_convnext"},
    "regressor": {"width": 8, "norm": "group"},
    "micro_batch": 3,
    "log_every": 1,
}
CPU = torch.device("cpu")


def train_on(data: OpenedData, config: DistillConfig, on_progress=None) -> RunResult:
    """`train` with data from memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trainer = Trainer(config, data, CPU)
        with RunFolder.open(config) as folder, StopRequest() as stop:
            return run(trainer, folder, stop, on_progress or (lambda _progress: None))


def tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, child in items for name, tensor in tensors(child, f"{path}/{key}").items()}


def assert_equal_checkpoints(first: Path, second: Path) -> None:
    one, other = tensors(load_checkpoint(first)), tensors(load_checkpoint(second))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(config: DistillConfig) -> list[float]:
    lines = read_metrics(Path(config.out))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
