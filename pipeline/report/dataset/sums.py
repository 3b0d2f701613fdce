"""What is summed of one level at one timestep while its samples stream by, and the figures that follow.

Memory is that of a few samples, whatever their number: sums by channel, two maps of the level's size, and the mean and
variance of each channel in each sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.schema import LevelSpec
from dtpipe.pipeline.report.dataset.moments import Moments, effective_rank

MOST_CHANNELS = 512
"""That moments are of; of more, so many drawn by the seed."""
FLAT_SHARE = 1e-8
"""A channel whose variance is below this share of the typical one is dead."""
EXPLODING_RATIO, EXPLODING_DEVIATIONS = 20.0, 8.0
"""A channel whose strength is so many times the typical one, and so many robust deviations above it, explodes."""

Channels = NDArray[np.float64]


@dataclass
class LevelSums:
    """Of one level at one timestep."""

    level: LevelSpec
    channels: NDArray[np.int64]
    """Those that moments are of."""
    num: int = 0
    """Samples."""
    num_draws: int = 0
    num_not_finite: int = 0
    sums: Channels = field(init=False)
    squares: Channels = field(init=False)
    largest: Channels = field(init=False)
    position_sums: Channels = field(init=False)
    """(C, h, w), of the first draw; positions and not channels, since noise share compares images at one place."""
    position_squares: Channels = field(init=False)
    within: float = 0.0
    """Unbiased variance between the draws of a sample, summed over samples, channels and positions."""
    squared_error: float = 0.0
    """As the codec states it, a mean over samples and draws, summed."""
    moments: Moments = field(init=False)
    means: list[Channels] = field(default_factory=list)
    """Of each sample, by channel."""
    variances: list[Channels] = field(default_factory=list)
    _origin: Channels | None = None

    def __post_init__(self) -> None:
        shape = (self.level.channels, self.level.height, self.level.width)
        self.sums, self.squares, self.largest = (np.zeros(shape[0]) for _ in range(3))
        self.position_sums, self.position_squares = np.zeros(shape), np.zeros(shape)
        self.moments = Moments(len(self.channels))

    def add(self, draws: Channels, error: Channels, cells: NDArray[np.int64]) -> None:
        """One sample. Shapes: draws (K, C, h, w), what the codec states of each (K), places of cells (n)."""
        finite = np.isfinite(draws)
        self.num_not_finite += int(draws.size - finite.sum())
        draws = np.where(finite, draws, 0.0)
        self.largest = np.maximum(self.largest, np.abs(draws).max(axis=(0, 2, 3)))
        if self._origin is None:  # so that a large mean costs no digits
            self._origin = draws.mean(axis=(0, 2, 3))[:, None, None]
        draws = draws - self._origin
        self.num, self.num_draws = self.num + 1, len(draws)
        self.sums += draws.mean(axis=(0, 2, 3))
        self.squares += np.square(draws).mean(axis=(0, 2, 3))
        first = draws[0]
        self.position_sums += first
        self.position_squares += np.square(first)
        if len(draws) > 1:
            self.within += float(draws.var(axis=0, ddof=1).sum())
        self.squared_error += float(np.square(error).mean())
        self.moments.add(first[self.channels].reshape(len(self.channels), -1).T[cells])
        self.means.append((first + self._origin).mean(axis=(1, 2)))
        self.variances.append(first.var(axis=(1, 2)))

    @property
    def channel_variances(self) -> Channels:
        """Over samples, draws and positions. Shapes: -> (C,)."""
        return np.clip(self.squares / self.num - np.square(self.sums / self.num), 0, None)

    @property
    def channel_means(self) -> Channels:
        """Shapes: -> (C,)."""
        assert self._origin is not None
        return np.asarray(self.sums / self.num + self._origin[:, 0, 0])

    def figures(self) -> LevelFigures:
        """What follows from the sums."""
        variances = self.channel_variances
        dead = dead_channels(variances, self.largest)
        exploding = exploding_channels(variances, self.channel_means, dead)
        mean_variance = float(variances.mean())
        between = self._between()
        return LevelFigures(
            num=self.num,
            num_draws=self.num_draws,
            num_not_finite=self.num_not_finite,
            mean=float(self.channel_means.mean()),
            deviation=float(np.sqrt(mean_variance)),
            largest=float(self.largest.max()),
            dead=tuple(np.flatnonzero(dead).tolist()),
            exploding=tuple(np.flatnonzero(exploding).tolist()),
            effective_rank=effective_rank(self.moments.covariance()),
            num_ranked=len(self.channels),
            image_share=None if self.num < 2 or mean_variance == 0 else between / (mean_variance * self._num_places),
            noise_share=None if self.num < 2 or self.num_draws < 2 or between == 0 else self._noise() / between,
            equal_draws=self.num_draws > 1 and self.within == 0,
            strengths=tuple(np.sqrt(variances + np.square(self.channel_means)).tolist()),
            relative_error=None if mean_variance == 0 else self.squared_error / self.num / mean_variance,
        )

    @property
    def _num_places(self) -> int:
        return self.position_sums.size

    def _between(self) -> float:
        """Unbiased variance between samples at one draw, summed over channels and positions."""
        if self.num < 2:
            return 0.0
        spread = self.position_squares - np.square(self.position_sums) / self.num
        return float(np.clip(spread, 0, None).sum() / (self.num - 1))

    def _noise(self) -> float:
        return self.within / self.num


@dataclass(frozen=True)
class LevelFigures:
    """Figures of one level at one timestep, over the samples that were looked at."""

    num: int
    num_draws: int
    num_not_finite: int
    mean: float
    deviation: float
    """Root of the mean variance of the channels."""
    largest: float
    dead: tuple[int, ...]
    exploding: tuple[int, ...]
    effective_rank: float
    num_ranked: int
    """Channels that the rank is of."""
    image_share: float | None
    """Variance between images at one place, over all variance of the channels; next to 0: all images look alike."""
    noise_share: float | None
    """Variance between noise draws of an image over that between images; None of one draw."""
    equal_draws: bool
    strengths: tuple[float, ...]
    """Root mean square of each channel."""
    relative_error: float | None
    """Squared error that the codec states over the variance."""


def dead_channels(variances: Channels, largest: Channels) -> NDArray[np.bool_]:
    """Channels that do not vary: by the typical variance, and by what float32 could show of their values."""
    typical = float(np.median(variances[variances > 0])) if (variances > 0).any() else 0.0
    return np.asarray(variances <= np.maximum(FLAT_SHARE * typical, np.square(1e-6 * largest)))


def exploding_channels(variances: Channels, means: Channels, dead: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Channels whose root mean square is far above that of all others."""
    strengths = np.log(np.sqrt(variances + np.square(means)) + 1e-300)
    typical = strengths[~dead]
    if len(typical) < 4:
        return np.zeros(len(variances), np.bool_)
    median = float(np.median(typical))
    deviation = 1.4826 * float(np.median(np.abs(typical - median)))
    limit = median + max(float(np.log(EXPLODING_RATIO)), EXPLODING_DEVIATIONS * deviation)
    return np.asarray((strengths > limit) & ~dead)
