"""What the loop asks of whatever is optimised: a course, batches as functions of the step, and the losses of a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.engine.trackers.config import Tracking


@dataclass(frozen=True)
class Course:
    """How long a run is, and what it does when."""

    num_steps: int
    steps_per_epoch: float
    """Not a whole number where batches go on over the ends of epochs."""
    epoch_size: int
    """Samples of an epoch."""
    seed: int = 0
    precision: torch.dtype = torch.float32
    """Of the forward pass. Under float16 the loss is scaled, and a step whose gradient overflows changes no weights."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    log_every: int = 20
    save_every: int = 1000
    """Steps from one write of last.pt to the next; some of these are kept."""
    save_every_s: float = math.inf
    """Longest time between two writes."""
    num_kept: int = 0
    """Checkpoints that are kept beside last.pt."""
    max_s: float = math.inf
    """Stop after so many seconds, which is no error."""
    tracking: Tracking | None = None
    """Where the lines of metrics.jsonl are shown too."""
    logged: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda losses: losses
    """What is logged, from the means over steps, samples and ranks of what the trainer measured."""
    advice: Callable[[Mapping[str, float]], str | None] = lambda _shares: None
    """A sentence on what to change, from the share of the time that each activity has."""
    remedy: str = "train anew with a lower learning rate"
    """What to do about a loss that is not finite."""
    smaller: str = "train anew in another --out with a smaller batch size"
    """What to do where a part of a batch has no room."""

    @property
    def num_epochs(self) -> int:
        """Epochs begun by the end of the run."""
        return math.ceil(self.num_steps / self.steps_per_epoch)


class BatchPart(Protocol):
    """What one rank takes at once of a global batch."""

    @property
    def keys(self) -> Sequence[str]:
        """Its samples, to be named when their loss is not finite."""
        ...

    @property
    def weight(self) -> float:
        """Share of the global batch; 0 where a rank has no sample left and repeats one."""
        ...

    @property
    def num_global(self) -> int:
        """Samples of the global batch, over all its parts and ranks."""
        ...

    @property
    def last(self) -> bool:
        """True for this rank's last part of a global batch: the optimiser steps after it."""
        ...


P = TypeVar("P", bound=BatchPart)


class Trainer(Protocol[P]):
    """What is optimised, on one rank."""

    @property
    def course(self) -> Course: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def network(self) -> nn.Module:
        """All that has gradients, as `Ranks.wrap` gives it back."""
        ...

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def watch(self) -> Stopwatch:
        """Charged for what the trainer times itself."""
        ...

    def batches(self, step: int) -> Iterator[P]:
        """The parts of the global batches from a step on, to the end of the run; a function of (seed, step, rank)."""
        ...

    def losses(self, part: P) -> Mapping[str, Tensor]:
        """Scalars, means over the samples of a part: `loss`, which is minimised, and whatever else is to be logged."""
        ...

    def learning_rate(self, step: int) -> float:
        """Rate of a step, which counts from 0."""
        ...

    def updated(self, step: int) -> None:
        """The optimiser has taken this many steps: time to update a moving average."""
        ...

    def named(self) -> Mapping[str, Any]:
        """What belongs into a checkpoint beside the optimiser, by name; see `CheckpointIO`."""
        ...
