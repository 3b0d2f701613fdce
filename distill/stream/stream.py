"""An endless-looking iterator over micro-batches for one rank, read ahead by threads; its position can be saved.

The position counts whole global batches: a run that stopped within one repeats it from its first micro-batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.stream.batch import FeatureBatch, flip_where, mirror_where
from dtpipe.distill.stream.decode import SentLevels, keep_packed
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.stream.order import (
    Part,
    StreamPosition,
    draw_samples,
    epoch_parts,
    key_hashes,
    num_batches,
    use_flips,
)
from dtpipe.distill.stream.sampling import Sampling, pass_hashes
from dtpipe.distill.stream.timesteps import view_timesteps
from dtpipe.distill.stream.transfer import DeviceCopies, Sent
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.read.source import read_images
from dtpipe.manifests.read.texts import texts_of
from dtpipe.manifests.schema import IMAGE, LevelSpec

if TYPE_CHECKING:
    from dtpipe.manifests.codecs.coded import CodedLevels
    from dtpipe.manifests.read.source import FeatureSource

FLIP, MIRROR, VIEW = "flip", "mirror", "view"


@dataclass(frozen=True)
class StreamSettings:
    """How a stream cuts and reads."""

    levels: tuple[str, ...]
    seed: int
    epochs: int
    batch_size: int
    micro_batch: int | None = None
    flip: bool | None = None
    equivariant: bool = False
    reencode: float = 0.0
    read_threads: int = 2
    prefetch: int = 4
    prefetch_bytes: int = 2 * 10**9
    """Of samples that are read ahead; a single part may have more."""
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class _ReadPart:
    """A part as the reading threads leave it: on its way to the device, stored samples first, live ones after them."""

    sent: Sent
    """`image`, `view`, `flip` and, where levels are mirrored, `mirror` of all samples."""
    levels: SentLevels | None
    """Of the stored samples; None without any."""
    rows: np.ndarray
    live: LiveSamples
    prepared: Any
    """What the live teacher prepared; None without live samples."""


class FeatureStream:
    """Batches of a feature dataset in the order of (seed, epoch); bad rows are left out."""

    def __init__(
        self,
        source: FeatureSource,
        settings: StreamSettings,
        device: torch.device,
        live: LiveTeacher | None = None,
        sampling: Sampling | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        """`watch` is charged for transfers and the live teacher.

        Raises: ConfigError on flips or live encoding that cannot be had; InputError when no row is good.
        """
        self.source, self.settings, self.device, self.live = source, settings, device, live
        self._watch = watch or Stopwatch(device)
        self._copies = DeviceCopies(device)
        keep_packed(source, device)
        self.sampling = sampling or Sampling(source.columns.ok_rows, len(source.columns))
        self.rows = self.sampling.rows
        if len(self.rows) == 0:
            raise InputError("the dataset has no good row; `dtpipe inspect` lists the bad ones")
        if settings.reencode > 0 and live is None:
            raise ConfigError(f"distill.reencode is {settings.reencode:g} and no live teacher was given; set it to 0")
        self.views = tuple(source.views)
        self._exact_live = live is not None and not live.makes_images
        otherwise = settings.equivariant or (settings.reencode == 1 and self._exact_live)
        wanted = True if settings.equivariant else settings.flip
        self.flips = use_flips(self.views, wanted, "distill.datasets", otherwise)
        self.mirrors = self.flips and not any(view.flip for view in self.views)
        """Whether stored levels are mirrored for flipped images."""
        self._timesteps = {
            name: torch.tensor(view_timesteps(source, name), device=device) for name in settings.levels
        }  # (V,)
        self._keys, self._labels = source.columns.keys, source.columns.labels
        self._hashes = key_hashes(self._keys)
        read = [level for level in source.levels if level.name in settings.levels]
        self._sample_bytes = 3 * math.prod(source.image_px) + sum(map(_size_of, read))

    @property
    def epoch_size(self) -> int:
        """Samples per epoch; a sample that comes twice counts twice."""
        return self.sampling.epoch_size

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, and so optimiser steps, of an epoch."""
        return num_batches(self.epoch_size, self.settings.batch_size)

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
                while len(ahead) > settings.prefetch or (
                    len(ahead) > 1 and self._size(ahead) > settings.prefetch_bytes
                ):
                    yield self._finish(*ahead.popleft())
            while ahead:
                yield self._finish(*ahead.popleft())

    def _size(self, ahead: Iterable[tuple[Part, object]]) -> int:
        """Bytes that some parts take when they are read."""
        return self._sample_bytes * sum(len(part.rows) for part, _ in ahead)

    def _parts(self, start: StreamPosition) -> Iterator[Part]:
        s = self.settings
        for epoch in range(start.epoch, s.epochs):
            position = start if epoch == start.epoch else StreamPosition(epoch)
            entries = self.sampling.entries(self._hashes, s.seed, epoch)
            yield from epoch_parts(entries, position, s.seed, s.batch_size, s.micro_batch, s.rank, s.world)

    def _read(self, part: Part) -> _ReadPart:
        """Read one part, send it to the device, and prepare its live samples; runs in a thread."""
        s = self.settings
        rows, passes = self.sampling.split(part.rows)
        draws = draw_samples(
            pass_hashes(self._hashes[rows], passes), s.seed, part.epoch, self.views, self.flips, s.reencode
        )
        by_origin = np.argsort(draws.live, kind="stable")
        rows, view, passes = (column[by_origin] for column in (rows, draws.view, passes))
        flip, live = draws.flip[by_origin], draws.live[by_origin]
        num_stored = len(rows) - int(live.sum())
        images, coded = self._read_rows(rows, view, num_stored)
        fresh = part.epoch * self.sampling.max_passes + passes
        samples = LiveSamples(texts_of(self._keys, rows), view, flip, fresh).take(np.arange(num_stored, len(rows)))
        prepared = self.live.prepare(samples) if self.live is not None and len(samples) else None
        mirror = {MIRROR: flip & ~(live & self._exact_live)} if self.mirrors else {}
        sent = self._copies.send({IMAGE: images, VIEW: view, FLIP: flip, **mirror})
        levels = None if coded is None else SentLevels.send(coded, self._copies)
        return _ReadPart(sent, levels, rows, samples, prepared)

    def _read_rows(self, rows: np.ndarray, view: np.ndarray, num_stored: int) -> tuple[np.ndarray, CodedLevels | None]:
        """Images of all rows, levels of the first `num_stored`."""
        names = self.settings.levels
        if num_stored == len(rows):
            return self.source.read(rows, names, view)
        images = read_images(self.source, rows[num_stored:])
        if num_stored == 0:
            return images, None
        stored_images, coded = self.source.read(rows[:num_stored], names, view[:num_stored])
        return np.concatenate([stored_images, images]), coded

    def _finish(self, part: Part, future: Future[_ReadPart]) -> FeatureBatch:
        """Decode, add live levels, then flip; runs where the training loop runs."""
        read = future.result()
        with self._watch.time("transfer"):
            sent = self._copies.receive(read.sent)
            levels = {} if read.levels is None else read.levels.receive(self._copies)
        images, flip, mirror = sent[IMAGE], sent[FLIP], sent.get(MIRROR)
        if len(read.live):
            with self._watch.time("teacher"):
                images, levels = self._with_live(read, images, levels)
        if mirror is not None:
            levels = {name: mirror_where(level, mirror) for name, level in levels.items()}
        images = flip_where(images, flip) if self.flips else images
        keys, labels = texts_of(self._keys, read.rows), texts_of(self._labels, read.rows)
        return FeatureBatch(
            images,
            levels,
            {name: of_view[sent[VIEW]] for name, of_view in self._timesteps.items()},
            keys,
            labels,
            part.epoch,
            part.batch_idx,
            part.num_global,
            part.weight,
            part.smallest,
            part.last,
        )

    def _with_live(
        self, read: _ReadPart, images: Tensor, levels: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and levels with the live samples after the stored ones."""
        assert self.live is not None  # refused in __init__
        num_stored = len(read.rows) - len(read.live)
        shown = images[num_stored:]
        pictures, fresh = self.live.encode(shown, read.live, read.prepared)
        names = self.settings.levels
        if absent := [name for name in names if name not in fresh]:
            raise ConfigError(
                f"the live teacher gives levels {sorted(fresh)}, and {absent} are regressed too; leave them out with "
                "-s distill.levels=..., or set distill.reencode to 0"
            )
        images = images if pictures is shown else torch.cat([images[:num_stored], pictures]) if num_stored else pictures
        return images, {name: torch.cat([levels[name], fresh[name]]) if levels else fresh[name] for name in names}


def _size_of(level: LevelSpec) -> int:
    """Bytes of the features of one sample."""
    return level.channels * level.height * level.width * np.dtype(level.dtype).itemsize
