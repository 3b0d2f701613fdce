"""An endless-looking iterator over micro-batches for one rank, read ahead by threads; its position can be saved.

The position counts whole global batches: a run that stopped within one repeats it from its first micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dtpipe.distill.batch import FeatureBatch, flip_where, scaled
from dtpipe.distill.order import Part, StreamPosition, draw_samples, epoch_parts, key_hashes, num_batches, use_flips
from dtpipe.distill.timing import Stopwatch
from dtpipe.distill.transfer import DeviceCopies, Sent
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.schema import IMAGE, ViewSpec

if TYPE_CHECKING:
    from dtpipe.manifests.reader import FeatureSource

FLIP = "flip"
LiveTeacher = Callable[[Tensor, Sequence[str], Sequence[int], Sequence[ViewSpec]], Mapping[str, Tensor]]
"""The teacher run live: images (B, 3, H, W) float32 in [-1, 1], unflipped; then one key, noise draw and view per image
-> {level: (B, C, h, w)}. Passed in by whoever knows both stages."""


@dataclass(frozen=True)
class StreamSettings:
    """How a stream cuts and reads."""

    levels: tuple[str, ...]
    seed: int
    epochs: int
    batch_size: int
    micro_batch: int | None = None
    flip: bool | None = None
    reencode: float = 0.0
    read_threads: int = 2
    prefetch: int = 4
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class _ReadPart:
    """A part as the reading threads leave it: on its way to the device, stored samples first, live ones after them."""

    sent: Sent
    """`image` and `flip` of all samples, and the levels of the stored ones."""
    rows: np.ndarray
    live_views: tuple[ViewSpec, ...]


class FeatureStream:
    """Batches of a feature dataset in the order of (seed, epoch); bad rows are left out."""

    def __init__(
        self,
        source: FeatureSource,
        settings: StreamSettings,
        device: torch.device,
        live: LiveTeacher | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        """`watch` is charged for transfers and the live teacher.

        Raises: ConfigError on flips or live encoding that cannot be had; InputError when no row is good.
        """
        self.source, self.settings, self.device, self.live = source, settings, device, live
        self._watch = watch or Stopwatch(device)
        self._copies = DeviceCopies(device)
        self.rows = np.asarray(source.ok_rows, dtype=np.int64)
        if len(self.rows) == 0:
            raise InputError("the dataset has no good row; `dtpipe inspect` lists the bad ones")
        if settings.reencode > 0 and live is None:
            raise ConfigError(f"distill.reencode is {settings.reencode:g} and no live teacher was given; set it to 0")
        self.views = tuple(source.views)
        self.flips = use_flips(self.views, settings.flip, "distill.datasets")
        self.num_stored_draws = 1 + max(view.draw for view in self.views)
        self._keys, self._labels = source.keys, source.labels
        self._hashes = key_hashes(self._keys)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, and so optimiser steps, of an epoch."""
        return num_batches(len(self.rows), self.settings.batch_size)

    def after(self, batch: FeatureBatch) -> StreamPosition:
        """The position once the global batch of `batch` is done."""
        if batch.batch_idx + 1 == self.batches_per_epoch:
            return StreamPosition(batch.epoch + 1, 0)
        return StreamPosition(batch.epoch, batch.batch_idx + 1)

    def batches(self, start: StreamPosition) -> Iterator[FeatureBatch]:
        """Micro-batches from a position to the end of the last epoch, read ahead by threads."""
        settings = self.settings
        parts = self._parts(start)
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(settings.read_threads, thread_name_prefix="dtpipe-read")
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            ahead: deque[tuple[Part, Future[_ReadPart]]] = deque()
            for part in parts:
                ahead.append((part, pool.submit(self._read, part)))
                if len(ahead) > settings.prefetch:
                    yield self._finish(*ahead.popleft())
            while ahead:
                yield self._finish(*ahead.popleft())

    def _parts(self, start: StreamPosition) -> Iterator[Part]:
        s = self.settings
        for epoch in range(start.epoch, s.epochs):
            position = start if epoch == start.epoch else StreamPosition(epoch)
            yield from epoch_parts(self.rows, position, s.seed, s.batch_size, s.micro_batch, s.rank, s.world)

    def _read(self, part: Part) -> _ReadPart:
        """Read one part and send it to the device; runs in a thread."""
        s = self.settings
        draws = draw_samples(self._hashes[part.rows], s.seed, part.epoch, self.views, self.flips, s.reencode)
        by_origin = np.argsort(draws.live, kind="stable")
        rows, flip, view = part.rows[by_origin], draws.flip[by_origin], draws.view[by_origin]
        num_stored = len(rows) - int(draws.live.sum())
        images, levels = self._read_rows(rows, view, num_stored)
        live_views = tuple(self._live_view(part.epoch, idx) for idx in view[num_stored:])
        return _ReadPart(self._copies.send({IMAGE: images, FLIP: flip, **levels}), rows, live_views)

    def _read_rows(self, rows: np.ndarray, view: np.ndarray, num_stored: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Images of all rows, levels of the first `num_stored`."""
        names = self.settings.levels
        if num_stored == len(rows):
            return self.source.read_batch(rows, names, view)
        images, _ = self.source.read_batch(rows[num_stored:], (), view[num_stored:])
        if num_stored == 0:
            return images, {}
        stored_images, levels = self.source.read_batch(rows[:num_stored], names, view[:num_stored])
        return np.concatenate([stored_images, images]), levels

    def _live_view(self, epoch: int, view_idx: int) -> ViewSpec:
        return self.views[view_idx].model_copy(update={"draw": self.num_stored_draws + epoch})

    def _finish(self, part: Part, future: Future[_ReadPart]) -> FeatureBatch:
        """Add live levels and flip the images; runs where the training loop runs."""
        read = future.result()
        keys = tuple(self._keys[row] for row in read.rows)
        with self._watch.time("transfer"):
            levels = dict(self._copies.receive(read.sent))
        images, flip = levels.pop(IMAGE), levels.pop(FLIP)
        if read.live_views:
            with self._watch.time("teacher"):
                levels = self._with_live(images, levels, keys, read.live_views)
        images = flip_where(images, flip) if self.flips else images
        labels = tuple(self._labels[row] for row in read.rows)
        return FeatureBatch(
            images, levels, keys, labels, part.epoch, part.batch_idx, part.num_global, part.weight, part.smallest, part.last
        )

    def _with_live(self, images: Tensor, levels: dict[str, Tensor], keys: tuple[str, ...], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Levels of all samples of a part, whose last ones have none yet."""
        assert self.live is not None  # refused in __init__
        fresh = self.live(scaled(images[-len(views) :]), keys[-len(views) :], [view.draw for view in views], views)
        names = self.settings.levels
        if absent := [name for name in names if name not in fresh]:
            raise ConfigError(
                f"the live teacher gives levels {sorted(fresh)}, and {absent} are regressed too; leave them out with "
                "-s distill.levels=..., or set distill.reencode to 0"
            )
        return {name: torch.cat([levels[name], fresh[name]]) if levels else fresh[name] for name in names}
