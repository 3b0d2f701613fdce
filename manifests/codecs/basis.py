"""The linear half of `transform`: normalising a sample, a basis over channels, cosines over the map, and back.

One rule: sums that decide what is stored are in float64 on one thread, so that a fit does not depend on the machine's
load or cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float64]

BASIS_UNIT: Final = 2.0**-14
"""Of a stored basis: 1 is exact in int16, and rounding to this is far below any step."""


@dataclass(frozen=True)
class ChannelBasis:
    """Rows of `basis` are orthonormal up to `BASIS_UNIT`, those of largest variance first."""

    basis: NDArray[np.int16]
    """(K, C), in units of `BASIS_UNIT`."""
    centre: NDArray[np.float32]
    """(C,): mean of each normalised channel."""

    def forward(self, normal: Floats) -> Floats:
        """Coefficients of normalised features. Shapes: [.., C, H, W] -> [.., K, H, W]."""
        centred = normal - self.centre.astype(np.float64)[:, None, None]
        cells = self._rows() @ centred.reshape(
            *centred.shape[:-2], centred.shape[-2] * centred.shape[-1]
        )  # [.., K, H*W]
        return cosines(cells.reshape(*cells.shape[:-1], *normal.shape[-2:]))

    def inverse(self, coefficients: Floats) -> Floats:
        """Normalised features of coefficients. Shapes: [.., K, H, W] -> [.., C, H, W]."""
        maps = from_cosines(coefficients)
        cells = self._rows().T @ maps.reshape(*maps.shape[:-2], maps.shape[-2] * maps.shape[-1])
        centred: Floats = cells.reshape(*cells.shape[:-1], *maps.shape[-2:])
        return centred + self.centre.astype(np.float64)[:, None, None]

    def _rows(self) -> Floats:
        return self.basis.astype(np.float64) * BASIS_UNIT


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


def fit_basis(samples: Iterable[Floats], channels: int) -> ChannelBasis:
    """The Karhunen-Loeve basis of normalised samples [C, H, W], all C rows.

    It is unique: rows by falling variance, the largest entry of each (of equal ones the first) above 0, and rounded,
    so that what differs in the last bits does not show.
    """
    with threadpool_limits(1):
        total, squares, num = np.zeros(channels), np.zeros((channels, channels)), 0
        for sample in samples:
            cells = sample.reshape(channels, -1)
            total, squares, num = total + cells.sum(axis=1), squares + cells @ cells.T, num + cells.shape[1]
        mean = total / max(num, 1)
        _variances, vectors = np.linalg.eigh(squares / max(num, 1) - np.outer(mean, mean))
    rows = vectors.T[::-1]
    signs = np.sign(rows[np.arange(channels), np.abs(np.round(rows, 6)).argmax(axis=1)])
    units = np.rint(rows * np.where(signs == 0, 1, signs)[:, None] / BASIS_UNIT)
    return ChannelBasis(units.astype(np.int16), mean.astype(np.float32))
