"""Do shards differ by more than chance: a worker with other weights or precision, a source that changes on the way.

A shard is compared with the median of all, in units of the deviation of single samples, so that no shard, however far
off, hides itself or another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_SHARDS = 4
"""Fewer have no typical one."""
_BY_CHANCE = 4.0
"""Times the shift that as few samples have by chance."""
_FROM_OTHERS = 3.0
"""Times the median shift."""
_LEAST_SHIFT = 0.5
"""In deviations of single samples: less is no matter, however sure."""
_SCALE = float(np.log(2.0))


@dataclass(frozen=True)
class ShardFigures:
    """One shard beside the others."""

    shard: int
    num: int
    """Samples that were looked at."""
    shift: float
    """Distance of the mean from the median shard's in deviations of samples, root mean square over channels."""
    scale: float
    """Typical ratio, over channels, of the variance to the median shard's."""
    differs: bool


def shard_figures(
    shards: Sequence[int], means: Sequence[NDArray[np.float64]], variances: Sequence[NDArray[np.float64]]
) -> tuple[ShardFigures, ...]:
    """Of samples with their shards, and the mean and variance of each channel in each.

    Shapes: (N), (N, C), (N, C).
    """
    numbers, idx = np.unique(np.asarray(shards), return_inverse=True)
    mean, variance = np.asarray(means), np.asarray(variances)
    nums = np.bincount(idx)
    by_shard = np.stack([mean[idx == place].mean(axis=0) for place in range(len(numbers))])
    variance_by_shard = np.stack([variance[idx == place].mean(axis=0) for place in range(len(numbers))])
    deviations = _deviations(mean - by_shard[idx], len(mean) - len(numbers))
    alive = deviations > 0
    if not alive.any():
        return tuple(
            ShardFigures(int(number), int(num), 0.0, 1.0, False) for number, num in zip(numbers, nums, strict=True)
        )
    distances = (by_shard - np.median(by_shard, axis=0))[:, alive] / deviations[alive]
    shifts = np.sqrt(np.square(distances).mean(axis=1))
    scales = _scales(variance_by_shard[:, alive])
    chance = 1 / np.sqrt(nums)
    far = (shifts > _BY_CHANCE * chance) & (shifts > _FROM_OTHERS * np.median(shifts)) & (shifts > _LEAST_SHIFT)
    far |= np.abs(scales) > _SCALE
    far &= (len(numbers) >= LEAST_SHARDS) & (nums > 1)
    columns = zip(numbers, nums, shifts, np.exp(scales), far, strict=True)
    return tuple(ShardFigures(int(a), int(b), float(c), float(d), bool(e)) for a, b, c, d, e in columns)


def _deviations(rest: NDArray[np.float64], degrees: int) -> NDArray[np.float64]:
    """Of samples around their shard's mean, by channel; robust, since a shard may be mixed. Shapes: (N, C) -> (C)."""
    if degrees < 1:
        return np.zeros(rest.shape[1])
    return np.asarray(np.sqrt(np.square(rest).sum(axis=0) / degrees))


def _scales(variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over channels of the log of each shard's variance over the median shard's. Shapes: (S, C) -> (S)."""
    logs = np.log(variances + 1e-300)
    return np.asarray(np.median(logs - np.median(logs, axis=0), axis=1))
