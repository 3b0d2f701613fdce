"""Second moments of feature vectors, summed as they stream by, and what follows from them: effective rank, and how much
of one level a linear map of another explains.

Nothing is kept but (D + 1)² sums, however many vectors there were.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]
_RIDGE = 1e-6
"""Of the mean variance of the inputs; keeps the solution finite where channels are constant."""
_FLAT = 1e-12
_PER_INPUT = 2
"""Vectors per input channel that a linear map is fitted to at least."""


@dataclass
class Moments:
    """Sums of the products of (1, x) with itself; x is taken from `origin`, so that a large mean costs no digits."""

    width: int
    origin: Vectors | None = None
    sums: Vectors = field(init=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((self.width + 1, self.width + 1))

    @property
    def num(self) -> int:
        """Vectors that were added."""
        return round(float(self.sums[0, 0]))

    def add(self, vectors: Vectors) -> None:
        """Shapes: (n, D)."""
        if self.origin is None:
            self.origin = vectors.mean(axis=0)
        beside = np.concatenate([np.ones((len(vectors), 1)), vectors - self.origin], axis=1)
        self.sums += beside.T @ beside

    def covariance(self) -> Vectors:
        """Shapes: -> (D, D)."""
        means = self.sums[0, 1:] / max(self.num, 1)
        return np.asarray(self.sums[1:, 1:] / max(self.num, 1) - np.outer(means, means))


def effective_rank(covariance: Vectors) -> float:
    """exp of the entropy of the shares of variance along the principal directions: 1 to D; 0 of no variance.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007, of the covariance's eigenvalues.
    """
    values = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    total = float(values.sum())
    if total <= _FLAT:
        return 0.0
    shares = values[values > _FLAT * total] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def explained(fitted: Moments, held_out: Moments, num_inputs: int) -> float | None:
    """R² on held-out vectors of the best linear map, with a constant, from the first channels to the others.

    Each of the others counts alike, whatever its scale; those without variance do not count. None of too few vectors to
    fit such a map. `held_out` has the origin of `fitted`.
    """
    if fitted.num < _PER_INPUT * (num_inputs + 1) or held_out.num < 2:
        return None
    inputs, outputs = slice(0, num_inputs + 1), slice(num_inputs + 1, None)
    variances = np.diag(fitted.covariance())[num_inputs:]
    counted = variances > _FLAT * max(1.0, float(variances.max(initial=0.0)))
    if not counted.any():
        return None
    square = fitted.sums[inputs, inputs].copy()
    ridge = _RIDGE * max(_FLAT, float(np.diag(square)[1:].mean()))
    square[np.diag_indices(num_inputs + 1)] += np.r_[0.0, np.full(num_inputs, ridge)]
    weights = np.linalg.solve(square, fitted.sums[inputs, outputs])  # (D + 1, E)
    own = np.diag(held_out.sums)[outputs]
    crossed = (weights * held_out.sums[inputs, outputs]).sum(axis=0)
    errors = own - 2 * crossed + (weights * (held_out.sums[inputs, inputs] @ weights)).sum(axis=0)
    means = fitted.sums[0, outputs] / fitted.num
    spread = own - 2 * means * held_out.sums[0, outputs] + held_out.num * means**2
    scales = 1 / variances[counted]
    return float(1 - (errors[counted] * scales).sum() / (spread[counted] * scales).sum())
