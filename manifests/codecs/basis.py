"""The linear half of `transform`: normalising a sample, cosines over the map, bases over channels, and back.

One rule: sums that decide what is stored are in float64 on one thread, so that a fit does not depend on the machine's
load or cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float64]

_ROW_STEPS: Final = 127  # of the largest entry of a row of a stored basis
"""Rounded rows are not quite orthonormal: what that loses, some 5e-5 of the variance, no step makes smaller."""


@dataclass(frozen=True)
class ChannelBasis:
    """For each region of frequencies a basis over channels: rows of unit length, of falling variance.

    Channels say other things of each other at other frequencies and directions; one basis for all is much worse.
    """

    basis: NDArray[np.int8]
    """(R, C), in units of its row: the rows of the first region, of the second, ..."""
    unit: NDArray[np.float32]
    """(R,)."""
    ranks: NDArray[np.int32]
    """(Z,): how many rows each region has; R together."""
    region: NDArray[np.uint8]
    """(H, W): of each frequency."""
    centre: NDArray[np.float32]
    """(C,): mean of each normalised channel."""

    @property
    def components(self) -> int:
        """K: rows of the zone that has most."""
        return int(self.ranks.max(initial=0))

    def regions(self) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Of each region the flat frequencies (F,), and the rows (k, C)."""
        region, ends = self.region.ravel(), np.cumsum(self.ranks)
        for idx, (end, rank) in enumerate(zip(ends, self.ranks, strict=True)):
            rows = slice(end - rank, end)
            yield np.flatnonzero(region == idx), self.basis[rows].astype(np.float64) * self.unit[rows, None]

    def by_region(self) -> tuple[NDArray[np.int64], list[slice]]:
        """All flat frequencies region by region, (F,), and where each region lies among them."""
        cells = [of_region for of_region, _ in self.regions()]
        ends = np.cumsum([len(of_region) for of_region in cells]).tolist()
        return np.concatenate(cells), [slice(end - len(part), end) for end, part in zip(ends, cells, strict=True)]

    def forward(self, normal: Floats) -> Floats:
        """Coefficients of normalised features. Shapes: [.., C, H, W] -> [.., K, H, W]; 0 beyond a region's rank."""
        waves = cosines(normal - self.centre.astype(np.float64)[:, None, None])
        flat = waves.reshape(*waves.shape[:-2], self.region.size)
        coefficients = np.zeros((*flat.shape[:-2], self.components, flat.shape[-1]))
        for cells, rows in self.regions():
            coefficients[..., : len(rows), cells] = rows @ flat[..., cells]
        return coefficients.reshape(*coefficients.shape[:-1], *self.region.shape)

    def inverse(self, coefficients: Floats) -> Floats:
        """Normalised features of coefficients. Shapes: [.., K, H, W] -> [.., C, H, W]."""
        flat = coefficients.reshape(*coefficients.shape[:-2], self.region.size)
        waves = np.zeros((*flat.shape[:-2], len(self.centre), flat.shape[-1]))
        for cells, rows in self.regions():
            waves[..., cells] = rows.T @ flat[..., : len(rows), cells]
        maps = from_cosines(waves.reshape(*waves.shape[:-1], *self.region.shape))
        return maps + self.centre.astype(np.float64)[:, None, None]


def frequency_regions(height: int, width: int) -> NDArray[np.uint8]:
    """Frequencies down and across: 0, 1 to 2, 3 to 6, 7 to 14, ... are an octave; a pair of octaves is a region.

    Shapes: -> [H, W].
    """
    down, across = (np.frexp(np.arange(1, side + 1))[1] - 1 for side in (height, width))
    return np.asarray(down[:, None] * (across[-1] + 1) + across[None, :], np.uint8)


def normalise(features: Floats) -> tuple[Floats, Floats]:
    """Each sample without its mean and by its deviation over C, H and W; zeros where that is 0.

    Shapes: [.., C, H, W] -> [.., C, H, W], [.., 2]: deviation and mean, as float32 has them.
    """
    axes = (-3, -2, -1)
    mean = features.mean(axis=axes).astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        deviation = features.std(axis=axes).astype(np.float32).astype(np.float64)
    apart = features - mean[..., None, None, None]
    scale = np.where(deviation > 0, deviation, np.inf)[..., None, None, None]
    return apart / scale, np.stack([deviation, mean], axis=-1)


def cosine_matrix(side: int) -> Floats:
    """Rows of the orthonormal DCT-II: row u is cos(pi (i + 1/2) u / side), of unit length. Shapes: -> [side, side]."""
    cell, frequency = np.arange(side) + 0.5, np.arange(side)[:, None]
    rows: Floats = np.cos(np.pi * cell * frequency / side) * np.sqrt(2 / side)
    rows[0] /= np.sqrt(2)
    return rows


def cosines(maps: Floats) -> Floats:
    """Cosine transform of the last two axes; energy stays. Shapes: [.., H, W] -> [.., H, W]."""
    down, across = (cosine_matrix(side) for side in maps.shape[-2:])
    return np.asarray(down @ maps @ across.T)


def from_cosines(coefficients: Floats) -> Floats:
    """The inverse of `cosines`."""
    down, across = (cosine_matrix(side) for side in coefficients.shape[-2:])
    return np.asarray(down.T @ coefficients @ across)


def fit_basis(samples: Iterable[Floats], channels: int, region: NDArray[np.uint8]) -> ChannelBasis:
    """The Karhunen-Loeve basis of each region, all rows, of normalised samples [C, H, W].

    A region of few frequencies has seen few values: it leans on the covariance over all regions, as if C / 2 of these
    were of it. The basis is unique: rows by falling variance, the largest entry of each (of equal ones the first) above
    0, and rounded, so that what differs in the last bits does not show.
    """
    cells = [np.flatnonzero(region.ravel() == idx) for idx in range(int(region.max()) + 1)]
    moments, total, num = np.zeros((len(cells), channels, channels)), np.zeros(channels), 0
    with threadpool_limits(1):
        for sample in samples:
            waves, num = cosines(sample).reshape(channels, -1), num + 1
            total += waves[:, 0]
            for idx, of_region in enumerate(cells):
                moments[idx] += waves[:, of_region] @ waves[:, of_region].T
        mean = total / max(num, 1)
        moments[region[0, 0]] -= max(num, 1) * np.outer(mean, mean)
        shared = moments.sum(axis=0)
        rows = [_stored(_rows(moment, shared, num * len(of))) for moment, of in zip(moments, cells, strict=True)]
    basis, unit = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    ranks = np.full(len(cells), channels, np.int32)
    return ChannelBasis(basis, unit, ranks, region, (mean / np.sqrt(region.size)).astype(np.float32))


def _rows(moment: Floats, shared: Floats, num: int) -> Floats:
    """Of the covariance of `num` values, leaning on the shape of `shared`."""
    channels, strength, trace = len(moment), np.trace(moment), np.trace(shared)
    leaning = moment + shared * (strength / trace * channels / 2 / max(num, 1)) if trace > 0 else moment
    _variances, vectors = np.linalg.eigh(leaning)
    rows: Floats = vectors.T[::-1]
    signs = np.sign(rows[np.arange(channels), np.abs(np.round(rows, 6)).argmax(axis=1)])
    return rows * np.where(signs == 0, 1, signs)[:, None]


def _stored(rows: Floats) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows in units of their own, and these. Shapes: [R, C] -> [R, C], [R]."""
    unit = (np.abs(rows).max(axis=1, initial=0) / _ROW_STEPS).astype(np.float32)
    return np.rint(rows / np.where(unit > 0, unit, 1)[:, None]).astype(np.int8), unit


def cut_basis(basis: ChannelBasis, used: NDArray[np.bool_]) -> ChannelBasis:
    """Each region without the rows behind the last that is used. Shapes: used [C, H, W]."""
    flat, ranks, kept, start = used.reshape(len(used), -1), list[int](), list[NDArray[np.int64]](), 0
    for (cells, _rows_of), rank in zip(basis.regions(), basis.ranks, strict=True):
        last = int(np.flatnonzero(flat[:, cells].any(axis=1)).max(initial=-1)) + 1
        ranks.append(last)
        kept.append(np.arange(start, start + last))
        start += int(rank)
    rows = np.concatenate(kept)
    return replace(basis, basis=basis.basis[rows], unit=basis.unit[rows], ranks=np.array(ranks, np.int32))
