"""The batches of a tuned task: functions of (seed, step, rank).

Images are taken from an endless sequence of shuffled passes, cut into batches of one size: where few are labelled,
batches go on over the ends of passes, and none is a small rest. A batch larger than the set is the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from dtpipe.distill.downstream.tuned.base import LearnTarget
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.examples import View
from dtpipe.distill.engine.ranks import Ranks
from dtpipe.distill.stream.order import cut, epoch_order, num_parts


@dataclass(frozen=True)
class ViewPart:
    """What one rank takes at once of a global batch, before it is read."""

    views: tuple[View, ...]
    step: int
    idx: int
    """Which part of the batch on its rank."""
    weight: float
    last: bool


@dataclass(frozen=True)
class TuneBatch:
    """The same, read and on the device."""

    images: Sequence[Tensor]
    """(3, H, W) float32 in [-1, 1] each."""
    targets: Sequence[LearnTarget]
    keys: tuple[str, ...]
    num_global: int
    part: ViewPart

    @property
    def weight(self) -> float:
        """Share of the global batch; 0 where a rank repeats a sample."""
        return self.part.weight

    @property
    def last(self) -> bool:
        """True for this rank's last part of a global batch."""
        return self.part.last


@dataclass(frozen=True)
class BatchOrder:
    """Which views each step holds."""

    num_images: int
    batch_size: int
    num_steps: int
    seed: int
    repeats: int = 1
    micro_batch: int | None = None

    @classmethod
    def of(cls, config: TuneConfig, num_images: int, seed: int) -> BatchOrder:
        """That of a training on so many images. A batch norm needs two images, so one alone comes twice."""
        repeats = config.augment.repeats
        size = min(config.batch_size, max(num_images * repeats, 2))
        steps = config.steps or -(-(config.epochs or 1) * num_images // size)
        return cls(num_images, size, steps, seed, repeats, config.micro_batch)

    def num_parts(self, num_ranks: int) -> tuple[int, int]:
        """Parts of a batch on each rank, and images in the smallest."""
        return num_parts(self.batch_size, self.micro_batch, num_ranks)

    def parts(self, step: int, ranks: Ranks) -> list[ViewPart]:
        """The parts of one global batch that a rank takes, as `stream.order.epoch_parts` cuts them."""
        batch = self._views(step)
        mine, count = cut(np.arange(len(batch)), ranks.size, ranks.rank), self.num_parts(ranks.size)[0]
        parts = []
        for idx in range(count):
            places = cut(mine, count, idx)
            views = tuple(batch[place] for place in places) or (batch[-1],)
            parts.append(ViewPart(views, step, idx, len(places) / len(batch), idx == count - 1))
        return parts

    def _views(self, step: int) -> list[View]:
        """Repeats of an image follow each other, so that they come into one batch.

        Differs: timm's repeated augmentation leaves out what does not fit into an epoch; here each image has its turn.
        """
        start = step * self.batch_size
        views = []
        for position in range(start, start + self.batch_size):
            image, repeat = divmod(position, self.repeats)
            passed, place = divmod(image, self.num_images)
            views.append(View(int(_order(self.num_images, self.seed, passed)[place]), passed, repeat))
        return views


@lru_cache(maxsize=4)
def _order(num_images: int, seed: int, passed: int) -> np.ndarray:
    return epoch_order(num_images, seed, passed)
