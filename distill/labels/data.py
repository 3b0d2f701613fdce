"""Labelled images with a teacher's features, and their batches: a function of (seed, step).

Features are read by row, by what is read together (a reading: one view, or the timesteps of one draw) and by flip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.segmentation.augment import mask_tensor
from dtpipe.distill.labels.interpreter import InterpreterLevel
from dtpipe.manifests.labels import Class, Mask

ReadFeatures = Callable[[int, int, bool], Mapping[str, Tensor]]
"""Row, reading, flip -> {level: (V * C, h, w)} float32 on the host."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features and targets of labelled images."""

    labelled: LabelledSet
    levels: tuple[InterpreterLevel, ...]
    read: ReadFeatures
    num_views: int = 1
    """Views that a reading holds."""
    num_readings: int = 1
    """Training draws one of them; the first is scored."""
    flips: bool = False
    """Whether there are features of mirrored images."""

    def __len__(self) -> int:
        return len(self.labelled)

    def target(self, row: int) -> Tensor:
        """Shapes: -> (H, W) int64 of a mask with `IGNORE`, or a scalar of a class."""
        target = self.labelled.target(row)
        if isinstance(target, Class):
            return torch.tensor(target.number)
        return mask_tensor(cast(Mask, target), self.labelled.classes)


@dataclass(frozen=True)
class InterpreterBatch:
    """One step's images; a `BatchPart`."""

    keys: Sequence[str]
    levels: Mapping[str, Tensor]
    """{level: (B, V * C, h, w)}"""
    truth: Tensor
    """(B, H, W) or (B,) int64."""
    weight: float = 1.0
    last: bool = True

    @property
    def num_global(self) -> int:
        """Images of the step."""
        return len(self.keys)


def batches_of(data: LabelledFeatures, batch_size: int, num_steps: int, seed: int, step: int) -> Iterator[Places]:
    """The places of each step from one on: rows, readings and flips; an epoch's last batch may be smaller."""
    per_epoch = steps_per_epoch(len(data), batch_size)
    for idx in range(step, num_steps):
        epoch, offset = divmod(idx, per_epoch)
        generator = np.random.Generator(np.random.Philox([seed, epoch]))
        chosen = slice(offset * batch_size, (offset + 1) * batch_size)
        order = generator.permutation(len(data))
        readings, flips = generator.integers(data.num_readings, size=len(data)), generator.random(len(data)) < 0.5
        yield Places(order[chosen].tolist(), readings[chosen].tolist(), (flips & data.flips)[chosen].tolist())


def steps_per_epoch(num: int, batch_size: int) -> int:
    """Batches of all images, the last one perhaps smaller."""
    return -(-num // batch_size)


@dataclass(frozen=True)
class Places:
    """Which images a batch takes, and how they are read."""

    rows: Sequence[int]
    readings: Sequence[int]
    flips: Sequence[bool]

    def gather(self, data: LabelledFeatures, device: torch.device) -> InterpreterBatch:
        """Read them. The target of a mirrored image is mirrored."""
        views = [data.read(*place) for place in zip(self.rows, self.readings, self.flips, strict=True)]
        levels = {level.name: torch.stack([view[level.name] for view in views]).to(device) for level in data.levels}
        truth = [data.target(row) for row in self.rows]
        truth = [one.flip(-1) if flip and one.ndim else one for one, flip in zip(truth, self.flips, strict=True)]
        keys = [data.labelled.keys[row] for row in self.rows]
        return InterpreterBatch(keys, levels, torch.stack(truth).to(device))
