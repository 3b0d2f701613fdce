"""Dividing bytes over levels: the least error, added over all, that so many bytes allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.words import count_of

_Floats = NDArray[np.float64]

CURVE_ERRORS: Final = (0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
_HALVINGS: Final = 60
_STEPS: Final = 512
_ROOM_AGAIN: Final = 0.99
_PRICES: Final = (1e-12, 1e3)  # error that a byte is worth


@dataclass(frozen=True)
class Curve:
    """Sizes that one level takes at several errors, which rise."""

    errors: tuple[float, ...]
    sizes: tuple[float, ...]
    """Bytes of a view; they fall."""

    def error_of(self, price: float) -> float:
        """The error where a level costs least, at a price of a byte: error + price * size."""
        errors, sizes = self._finely
        return float(errors[np.argmin(errors + price * sizes)])

    def size_of(self, error: float) -> float:
        """Bytes at an error, between those that were measured on the logarithm of the error."""
        errors, sizes = self._finely
        return float(np.interp(np.log(error), np.log(errors), sizes))

    @cached_property
    def _finely(self) -> tuple[_Floats, _Floats]:
        """Errors close to each other, and their sizes."""
        known = np.log(np.maximum(np.maximum.accumulate(self.errors), 1e-12))
        errors = np.linspace(known[0], known[-1], _STEPS)
        return np.exp(errors), np.interp(errors, known, np.minimum.accumulate(self.sizes))


def budget_too_small(budget_bytes: int, num_rows: int, least_bytes: float) -> ConfigError:
    """What to raise where a dataset cannot come within its budget; `least_bytes` of a sample, at the largest error."""
    return ConfigError(
        f"extract.codec.budget of {budget_bytes} bytes is {budget_bytes / num_rows:.0f} for each of "
        f"{count_of(num_rows, 'sample')}; images, levels at {CURVE_ERRORS[-1]:.0%} error and all files beside them "
        f"take about {least_bytes:.0f}: give more, store fewer levels, views or samples, or (of few samples) set "
        "extract.shard.samples to their number, since a shard has room in its index for all that it may hold"
    )


def over_budget(size_bytes: int, budget_bytes: int) -> str | None:
    """What to say of a dataset that takes more than its budget; None of one that does not."""
    if size_bytes <= budget_bytes:
        return None
    lower = int(_ROOM_AGAIN * budget_bytes**2 / size_bytes)
    return (
        f"the dataset takes {size_bytes} bytes, {size_bytes / budget_bytes - 1:.1%} more than extract.codec.budget of "
        f"{budget_bytes}; the sample of the fit foretold less. Where that is too much, extract "
        f"to another --out with --budget {lower}, or with more of extract.codec.fit_samples"
    )


def divide(curves: Mapping[str, Curve], view_bytes: float) -> dict[str, float] | None:
    """The error of each level: the least in sum that fits into the bytes of a view; None where nothing fits.

    Lagrangian: at the solution all levels have the same error per byte, the price. Errors are relative, so levels
    count alike, as their losses do.
    """

    def size_at(price: float) -> float:
        return sum(curve.size_of(curve.error_of(price)) for curve in curves.values())

    low, high = _PRICES
    if size_at(high) > view_bytes:
        return None
    if size_at(low) <= view_bytes:
        return {name: curve.error_of(low) for name, curve in curves.items()}
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if size_at(middle) > view_bytes else (low, middle)
    return {name: curve.error_of(high) for name, curve in curves.items()}
