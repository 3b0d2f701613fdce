"""Looks at a bounded sample of a dataset, a few rows at a time, and sums what the page says of its levels.

The sample is drawn by the seed: as many rows of each of some shards, so that shards can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.coded import CodedLevels
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.phases import phase
from dtpipe.manifests.read.source import FeatureSource, read_images
from dtpipe.manifests.schema import LevelSpec
from dtpipe.pipeline.report.dataset.drift import ShardFigures, shard_figures
from dtpipe.pipeline.report.dataset.labels import LogitSums
from dtpipe.pipeline.report.dataset.moments import Moments, explained
from dtpipe.pipeline.report.dataset.opened import OpenedDatasets
from dtpipe.pipeline.report.dataset.sums import MOST_CHANNELS, LevelFigures, LevelSums
from dtpipe.pipeline.report.maps.features import RowIdxs

MOST_DRAWS = 4
"""Of a sample that are read."""
CELLS = 64
"""Of a sample that moments are summed over, drawn by the seed."""
MOST_SHARDS = 64
_AT_ONCE_BYTES = 64_000_000
_PIXEL_FEATURES = 24


@dataclass(frozen=True)
class Stack:
    """The levels of one timestep, and the views that are its draws of the unflipped image."""

    timestep: int | None
    views: tuple[int, ...]


@dataclass(frozen=True)
class Looked:
    """What a look at a dataset gave."""

    rows: RowIdxs
    levels: Mapping[tuple[str, int | None], LevelFigures]
    """By level and timestep."""
    shards: Mapping[str, tuple[ShardFigures, ...]]
    """By level, at the first timestep."""
    between: Mapping[tuple[str, str], float | None]
    """R² of the coarser level's channels from the finer one's, and the other way, at the coarser one's cells."""
    of_pixels: Mapping[str, float | None]
    """R² of a level's channels from the pixels below each cell; empty where no images are stored."""
    soft_labels: Mapping[str, LogitSums]


def stacks_of(source: FeatureSource) -> list[Stack]:
    """Each timestep with the draws that are looked at: unflipped ones, where there are such."""
    views = list(enumerate(source.views))
    unflipped = [(idx, view) for idx, view in views if not view.flip] or views
    timesteps = dict.fromkeys(view.timestep for _, view in unflipped)
    return [
        Stack(timestep, tuple(idx for idx, view in unflipped if view.timestep == timestep)[:MOST_DRAWS])
        for timestep in timesteps
    ]


def sample_rows(ok_rows: RowIdxs, shard_of: RowIdxs, num: int, seed: int) -> RowIdxs:
    """About so many rows, ascending: equally many of each of at most `MOST_SHARDS` shards.

    Shapes: (N), the shard of each of them (N).
    """
    generator = np.random.Generator(np.random.Philox(seed))
    shards = np.unique(shard_of)
    if len(shards) > MOST_SHARDS:
        shards = np.sort(generator.choice(shards, MOST_SHARDS, replace=False))
    quota = max(1, -(-num // len(shards)))
    chosen = []
    for shard in shards:
        own = ok_rows[shard_of == shard]
        chosen.append(own if len(own) <= quota else generator.choice(own, quota, replace=False))
    rows = np.concatenate(chosen)
    return np.sort(rows if len(rows) <= num else generator.choice(rows, num, replace=False))


def look_at(opened: OpenedDatasets, num: int, seed: int) -> Looked:
    """Read about `num` samples and sum them up.

    Raises: InputError without a good sample; what the readers raise.
    """
    source = opened.source
    ok_rows = source.columns.ok_rows
    if not len(ok_rows):
        raise InputError(f"{source.columns.where}: no sample is good, so there is nothing to look at")
    rows = sample_rows(ok_rows, opened.shards()[ok_rows], num, seed)
    sums = _Sums(source, seed, opened.has_images)
    for part in _in_parts(rows, source):
        sums.add(part)
    return sums.looked(rows, opened)


def _in_parts(rows: RowIdxs, source: FeatureSource) -> Iterator[RowIdxs]:
    """RowIdxs whose decoded levels fit into `_AT_ONCE_BYTES`."""
    one = sum(level.channels * level.height * level.width * 8 for level in source.levels) * MOST_DRAWS
    at_once = max(1, _AT_ONCE_BYTES // one)
    with phase("samples", len(rows)) as seen:
        for start in range(0, len(rows), at_once):
            yield rows[start : start + at_once]
            seen.done = min(start + at_once, len(rows))


@dataclass
class _Pair:
    """Moments of two levels side by side, of samples to fit on and of those held out, both ways."""

    first: LevelSums
    other: LevelSums
    moments: tuple[Moments, Moments] = field(init=False)

    def __post_init__(self) -> None:
        width = len(self.first.channels) + len(self.other.channels)
        self.moments = (Moments(width), Moments(width))

    def add(self, vectors: NDArray[np.float64], side: int) -> None:
        """Shapes: (n, C + C')."""
        own, other = self.moments[side], self.moments[1 - side]
        own.origin = own.origin if own.origin is not None else other.origin
        own.add(vectors)

    def forwards(self) -> float | None:
        """The other level from the first."""
        fitted, held_out = self.moments
        return explained(fitted, held_out, len(self.first.channels))

    def backwards(self) -> float | None:
        """The first level from the other."""
        fitted, held_out = (_swapped(one, len(self.first.channels)) for one in self.moments)
        return explained(fitted, held_out, len(self.other.channels))


def _swapped(moments: Moments, width: int) -> Moments:
    order = np.r_[0, 1 + width : moments.width + 1, 1 : width + 1]
    swapped = Moments(moments.width)
    swapped.sums = moments.sums[np.ix_(order, order)]
    return swapped


class _Sums:
    """All sums over one source."""

    def __init__(self, source: FeatureSource, seed: int, with_images: bool) -> None:
        self.source, self.stacks, self.with_images = source, stacks_of(source), with_images
        self.generator = np.random.Generator(np.random.Philox([seed, 1]))
        self.channels = {level.name: self._some_channels(level) for level in source.levels}
        self.sums = {
            (level.name, stack.timestep): LevelSums(level, self.channels[level.name])
            for stack in self.stacks
            for level in source.levels
        }
        self.first = {level.name: self.sums[level.name, self.stacks[0].timestep] for level in source.levels}
        features = sorted((level for level in source.levels if level.role == "features"), key=lambda one: one.stride)
        self.pairs = {
            (fine.name, coarse.name): _Pair(self.first[fine.name], self.first[coarse.name])
            for fine, coarse in pairwise(features)
        }
        widths = {level.name: _PIXEL_FEATURES + len(self.channels[level.name]) for level in features if with_images}
        self.pixels = {name: (Moments(width), Moments(width)) for name, width in widths.items()}
        self.logits = {level.name: LogitSums(level.channels) for level in source.levels if level.role == "soft_labels"}
        self.num = 0

    def _some_channels(self, level: LevelSpec) -> NDArray[np.int64]:
        if level.channels <= MOST_CHANNELS:
            return np.arange(level.channels)
        return np.sort(self.generator.choice(level.channels, MOST_CHANNELS, replace=False))

    def add(self, rows: RowIdxs) -> None:
        """Read and sum some rows."""
        images = read_images(self.source, rows) if self.with_images else None
        for place, stack in enumerate(self.stacks):
            coded = [self._read(rows, view) for view in stack.views]
            for name, first in self.first.items():
                draws = np.stack([one.decode()[name] for one in coded], axis=1).astype(np.float64)  # (B, K, C, h, w)
                errors = np.stack([one.error()[name] for one in coded], axis=1)
                sums = self.sums[name, stack.timestep]
                for sample, error in zip(draws, errors, strict=True):
                    sums.add(sample, error, self._cells(first.level))
                if name in self.logits and place == 0:
                    self.logits[name].add(draws[:, 0])
            if place == 0:
                self._relate({name: level.astype(np.float64) for name, level in coded[0].decode().items()}, images)
        self.num += len(rows)

    def _read(self, rows: RowIdxs, view: int) -> CodedLevels:
        names = [level.name for level in self.source.levels]
        return self.source.read(rows, names, np.full(len(rows), view), images=False)[1]

    def _cells(self, level: LevelSpec) -> NDArray[np.int64]:
        num = level.height * level.width
        return np.arange(num) if num <= CELLS else self.generator.choice(num, CELLS, replace=False)

    def _relate(self, levels: Mapping[str, NDArray[np.float64]], images: NDArray[np.uint8] | None) -> None:
        """Levels with each other, and with the pixels; every second sample is held out."""
        num = len(next(iter(levels.values())))
        for idx in range(num):
            side = (self.num + idx) % 2
            for (fine, coarse), pair in self.pairs.items():
                level = pair.other.level
                below = pooled(levels[fine][idx][self.channels[fine]], (level.height, level.width))
                beside = np.concatenate([below, levels[coarse][idx][self.channels[coarse]]])
                pair.add(beside.reshape(len(beside), -1).T[self._cells(level)], side)
            for name, both in self.pixels.items():
                assert images is not None
                level = self.first[name].level
                below = pixel_features(images[idx], (level.height, level.width))
                beside = np.concatenate([below, levels[name][idx][self.channels[name]]])
                own, other = both[side], both[1 - side]
                own.origin = own.origin if own.origin is not None else other.origin
                own.add(beside.reshape(len(beside), -1).T[self._cells(level)])

    def looked(self, rows: RowIdxs, opened: OpenedDatasets) -> Looked:
        """What follows from all that was added."""
        between: dict[tuple[str, str], float | None] = {}
        for (fine, coarse), pair in self.pairs.items():
            between[fine, coarse], between[coarse, fine] = pair.forwards(), pair.backwards()
        return Looked(
            rows=rows,
            levels={name: sums.figures() for name, sums in self.sums.items()},
            shards={
                name: shard_figures(opened.shards_of_level(name, rows).tolist(), sums.means, sums.variances)
                for name, sums in self.first.items()
            },
            between=between,
            of_pixels={name: explained(*both, _PIXEL_FEATURES) for name, both in self.pixels.items()},
            soft_labels=self.logits,
        )


def pooled(level: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """The mean over what lies in each cell of a coarser grid. Shapes: (C, h, w) -> (C, *grid)."""
    for axis, size in zip((1, 2), grid, strict=True):
        bounds = np.arange(size) * level.shape[axis] // size
        counts = np.diff(np.append(bounds, level.shape[axis]))
        level = np.add.reduceat(level, bounds, axis=axis) / np.expand_dims(counts, tuple({0, 1, 2} - {axis}))
    return level


def pixel_features(image: NDArray[np.uint8], grid: tuple[int, int]) -> NDArray[np.float64]:
    """Colours of the four quarters of each cell, and how far each is from the cell's mean.

    Shapes: (H, W, 3) -> (24, *grid).
    """
    pixels = image.transpose(2, 0, 1).astype(np.float64) / 127.5 - 1
    quarters = pooled(_at_least(pixels, 2 * grid[0], 2 * grid[1]), (2 * grid[0], 2 * grid[1]))
    parts = np.concatenate([quarters[:, top::2, left::2] for top in (0, 1) for left in (0, 1)])  # (12, *grid)
    means = np.tile(parts.reshape(4, 3, *grid).mean(axis=0), (4, 1, 1))
    return np.concatenate([parts, np.abs(parts - means)])


def _at_least(pixels: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Pixels repeated, where there are fewer than cells."""
    rows = np.arange(max(height, pixels.shape[1])) * pixels.shape[1] // max(height, pixels.shape[1])
    columns = np.arange(max(width, pixels.shape[2])) * pixels.shape[2] // max(width, pixels.shape[2])
    return pixels[:, rows[:, None], columns]
