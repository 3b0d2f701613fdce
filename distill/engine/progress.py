"""What a run says about itself: lines of metrics.jsonl and the result at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dtpipe.distill.engine.ranks import ALONE, Ranks
from dtpipe.distill.engine.timing import Stopwatch


@dataclass(frozen=True)
class TrainProgress:
    """One line of metrics.jsonl; means are over the steps since the line before."""

    step: int
    num_steps: int
    epoch: int
    """Epochs begun, from 1."""
    num_epochs: int
    lr: float
    grad_norm: float
    losses: dict[str, float]
    """`loss`, which is minimised, and what else the trainer measures: its terms, and with a slash parts of these."""
    throughput_img_s: float
    remaining_s: float
    """Until the run is at its end, or at its time limit."""
    shares: dict[str, float]
    """Share of the time in `data` (waiting for it), `transfer` to the device, `teacher` (live), `model` (forward and
    backward), `optimiser` and `save`."""
    advice: str | None = None
    """What to change, when the device waits too long for data."""
    limit_step: int | None = None
    """Where the time limit is going to end this part of the run; None: the run comes to its end before."""

    def record(self) -> dict[str, Any]:
        """The line as plain values."""
        values = asdict(self)
        losses = values.pop("losses")
        shares = {f"share/{name}": round(share, 4) for name, share in values.pop("shares").items()}
        said = {name: values.pop(name) for name in ("advice", "limit_step")}
        return {**values, **losses, **shares, **{name: value for name, value in said.items() if value is not None}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TrainProgress:
        """Inverse of `record`."""
        own = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        shares = {name.removeprefix("share/"): value for name, value in record.items() if name.startswith("share/")}
        return cls(**own, losses=losses_of(record), shares=shares)


def losses_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The losses of a line of metrics.jsonl."""
    others = {field.name for field in fields(TrainProgress)}
    return {name: value for name, value in record.items() if name not in others and not name.startswith("share/")}


OnTrainProgress = Callable[[TrainProgress], None]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. Seconds, throughput and shares are of this process, not of the parts before a resume."""

    run_dir: Path
    checkpoint: Path
    step: int
    """Below `num_steps` when the run stopped at its time limit."""
    num_steps: int
    num_epochs: int
    num_samples: int
    """Of an epoch."""
    resumed_step: int
    losses: dict[str, float]
    """Of the last line of metrics.jsonl."""
    seconds: float
    throughput_img_s: float
    shares: dict[str, float]
    rank: int = 0
    """Of the process that says this."""
    num_ranks: int = 1
    notes: Sequence[str] = ()
    """What was said of a damaged folder when the run went on in it."""

    def record(self) -> dict[str, Any]:
        """The result as plain values."""
        return asdict(self) | {"run_dir": str(self.run_dir), "checkpoint": str(self.checkpoint)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `record`."""
        return cls(**{**record, "run_dir": Path(record["run_dir"]), "checkpoint": Path(record["checkpoint"])})


class Meter:
    """Means of losses and shares of time since it was made; reads from the device only when asked."""

    def __init__(self, watch: Stopwatch) -> None:
        self.num_steps = 0
        self.num_images = 0
        self._watch = watch
        self._before = watch.seconds()
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, losses: Mapping[str, Tensor], weight: float) -> None:
        """Count the losses of a part that is `weight` of its global batch; scalars."""
        values = torch.stack([loss.detach() for loss in losses.values()]) * weight
        self._names = list(losses)
        self._sums = values if self._sums is None else self._sums + values

    def count_step(self, num_images: int) -> None:
        """Count an optimiser step."""
        self.num_steps += 1
        self.num_images += num_images

    def losses(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Mean per step of each loss, over the samples of all ranks."""
        if self._sums is None:
            return {}
        return dict(zip(self._names, (ranks.sum(self._sums) / self.num_steps).tolist(), strict=True))

    def seconds(self) -> dict[str, float]:
        """Seconds by activity."""
        return {activity: total - self._before.get(activity, 0.0) for activity, total in self._watch.seconds().items()}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each activity's share of all seconds charged."""
    total = sum(seconds.values()) or 1.0
    return {activity: value / total for activity, value in seconds.items()}
