"""How far the gradient of the training loss turns when the features of the very same batches were stored otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.device import seeded
from dtpipe.distill.engine.run_folder import read_config
from dtpipe.distill.stream.data import open_data
from dtpipe.distill.trainer import Distillation

CPU = torch.device("cpu")
PARTS = ("regressor", "student")


@dataclass(frozen=True)
class Pulled:
    """What one batch asks of the weights."""

    keys: tuple[str, ...]
    levels: Mapping[str, Tensor]
    """(B, C, h, w) each."""
    gradients: Mapping[str, Tensor]
    """All parameters of a part in one vector."""


def compare_gradients(reference: str, runs: Mapping[str, Path], num_batches: int) -> dict[str, Any]:
    """Of each run's data against the reference's: relative squared error by level, and cosines of the gradients.

    Batches are the first of the runs, whose seeds are the same. Means over batches; `initial`: at the weights that a
    seed begins with, `trained`: at those that the reference ended with.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in runs if name != reference}
    trained = load_checkpoint(runs[reference] / "last.pt", "distill")
    for when, state in (("initial", None), ("trained", trained)):
        true = list(pulls(runs[reference], state, num_batches))
        for name, measured in found.items():
            others = list(pulls(runs[name], state, num_batches))
            for one, other in zip(true, others, strict=True):
                assert one.keys == other.keys, f"batches of {name} and {reference} differ"
            pairs = list(zip(others, true, strict=True))
            measured["relative_mse"] = {
                level: mean(relative_mse(one.levels[level], other.levels[level]) for one, other in pairs)
                for level in true[0].levels
            }
            measured[f"cosine_{when}"] = {
                part: mean(cosine(one.gradients[part], other.gradients[part]) for one, other in pairs) for part in PARTS
            }
    return found


def pulls(run: Path, state: Mapping[str, Any] | None, num_batches: int) -> Iterator[Pulled]:
    """The first batches of a run with their gradients, all at the same weights: of a checkpoint, or as it began."""
    config = DistillConfig.model_validate(read_config(run))
    with seeded(config.seed, CPU):
        trainer = Distillation(config, open_data(config), CPU)
    if state is not None:
        trainer.model.student.load_state_dict(state["student"])
        regressor_of(trainer).load_state_dict(state["regressor"])
    for batch in islice(trainer.batches(0), num_batches):
        trainer.model.zero_grad()
        trainer.losses(batch)["loss"].backward()  # type: ignore[no-untyped-call]
        modules = (regressor_of(trainer), trainer.model.student)
        yield Pulled(batch.keys, batch.levels, dict(zip(PARTS, (gradient(module) for module in modules), strict=True)))


def regressor_of(trainer: Distillation) -> nn.Module:
    """Of a run that regresses features."""
    assert trainer.model.regressor is not None
    return trainer.model.regressor


def gradient(module: nn.Module) -> Tensor:
    """All of a module's gradients in one vector, float64."""
    return torch.cat([weight.grad.flatten().double() for weight in module.parameters() if weight.grad is not None])


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two vectors. Shapes: (n,), (n,)."""
    return float(one @ other / (one.norm() * other.norm()))


def relative_mse(features: Tensor, true: Tensor) -> float:
    """Squared error over the variance of each sample, mean over samples. Shapes: (B, C, h, w), twice."""
    apart, values = (features.double() - true.double()).flatten(1), true.double().flatten(1)
    return float((apart.square().mean(dim=1) / values.var(dim=1, correction=0)).mean())


def mean(values: Iterator[float]) -> float:
    """Of some values."""
    known = list(values)
    return sum(known) / len(known)
