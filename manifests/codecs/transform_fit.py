"""Fitting `transform` to a sample of features: the basis, the step that meets an error, the bands and their points.

One rule: errors and sizes are of samples that the basis was not fitted on, and all is in float64 on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numcodecs import Zstd
from numpy.typing import NDArray
from scipy.optimize import brentq

from dtpipe.manifests.codecs.basis import ChannelBasis, Floats, cut_basis, fit_basis, frequency_regions, normalise
from dtpipe.manifests.codecs.fit import Fit, FitTarget, OnStep, go_on
from dtpipe.manifests.codecs.quantise import MAX_BANDS, NO_BAND, Quantiser, to_symbols
from dtpipe.manifests.codecs.rans_tables import RansTables, expected_bytes, fit_tables
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec

HELD_OUT: Final = 4  # each fourth sample is kept from the basis
ROOM: Final = 2  # numbers of one byte are to take so many times what the sample has
NEVER: Final = 0.12  # coefficients of a deviation below so many steps are not stored
LEANING: Final = 8  # samples
BANDS_PER_OCTAVE: Final = 4
ROUNDING: Final = 0.40
ROUNDS: Final = 2  # of moving thresholds
PRICE: Final = 0.11  # squared steps that a bit is worth
STEPS: Final = (2.0**-10, 2.0**8)  # the least and the largest step that is tried
STRIDE: Final = 1.4  # between logarithms of steps, until one is too large
NEAR: Final = 1e-3  # of the logarithm of the step
LEAST_ERROR: Final = 1e-12  # which has a logarithm, where nothing is lost
NORM_BYTES: Final = 12
TURNED_BACK: Final = 16  # held samples that show what the basis alone loses
_MATRICES: Final = 8  # of C by C, beside a moment of each region, that a decomposition takes
_MAKING, _TRYING = 12, 22  # bytes of each held coefficient, at most, while bases are made and steps are tried
_COPIES: Final = 8  # of one sample, in float64


@dataclass(frozen=True)
class Held:
    """Coefficients of the samples that were kept from the basis."""

    coefficients: NDArray[np.float32]
    """[n, C, H, W], of normalised features."""
    deviation: Floats
    """[C, H, W]: root mean square of each coefficient."""
    fixed_mse: float
    """What the basis loses of normalised features, there and back."""


def fit_transform(
    level: LevelSpec, features: NDArray[np.generic], on_step: OnStep = go_on
) -> Callable[[FitTarget], Fit]:
    """Parameters and arrays of the level for any target, from one basis. Shapes: raw features [N, C, H, W].

    `on_step` is called for each sample, and for each step that is tried.
    Raises: ConfigError when there is no sample, or one is not finite; what `on_step` raises.
    """
    _check(level, features)
    basis, held = _transformed(features, on_step)
    return lambda target: _fit_of(basis, held, make_quantiser(held, _meet(held, target.relative_mse, on_step)), target)


def fit_bytes(level: LevelSpec, num: int) -> int:
    """About the most memory that a fit to `num` samples takes beside these: first for the bases, then for a try."""
    cells, num_held, basis_bytes = _sizes(level, num)
    making = 8 * (basis_bytes + _MATRICES * level.channels**2) + _MAKING * num_held * cells
    return max(making, 2 * basis_bytes + _TRYING * num_held * cells) + 8 * _COPIES * cells


def held_bytes(level: LevelSpec, num: int) -> int:
    """Of what a fit keeps for further targets."""
    cells, num_held, basis_bytes = _sizes(level, num)
    return 4 * num_held * cells + 8 * cells + basis_bytes


def _sizes(level: LevelSpec, num: int) -> tuple[int, int, int]:
    """Coefficients of a sample, samples that are held, and bytes of the basis, of `num` samples."""
    regions = int(frequency_regions(level.height, level.width).max()) + 1
    num_held = num // HELD_OUT if num >= 2 * HELD_OUT else num
    return level.channels * level.height * level.width, num_held, regions * level.channels**2


def make_quantiser(held: Held, step: float) -> Quantiser:
    """Bands of like deviation, those of the largest first, and their dead zones and points for a step.

    The coefficient that deviates most is always kept: a level has symbols, if only one.
    """
    steps = held.deviation / step
    with np.errstate(divide="ignore"):
        octaves = np.floor(BANDS_PER_OCTAVE * np.log2(np.maximum(steps, NEVER)))
    kept = steps >= NEVER
    kept.ravel()[steps.argmax()] = True
    names = np.unique(octaves[kept])[::-1][:MAX_BANDS]
    band = np.where(kept, np.searchsorted(-names, -octaves), NO_BAND).astype(np.uint8)
    num = len(names)
    floats = np.full(num, 1 - ROUNDING, np.float32), np.full(num, ROUNDING, np.float32), np.zeros((num, 2), np.float32)
    quantiser = Quantiser(step, band, *floats)
    for _ in range(ROUNDS):
        quantiser = _moved(quantiser, held.coefficients)
    return replace(quantiser, shift=_counts_and_shifts(quantiser, held.coefficients)[1])


def _moved(quantiser: Quantiser, coefficients: NDArray[np.float32]) -> Quantiser:
    """Its thresholds where a value costs as much on both sides, in squared error and `PRICE` times bits.

    Source: Chou, Lookabaugh, Gray, 1989, entropy-constrained quantisation; of magnitudes above 1, by their mean ratio.
    """
    counts, shifts = _counts_and_shifts(quantiser, coefficients)
    zeros, ones, larger = (counts + 0.5).T
    dearer = np.log2(zeros / ones) + 1  # in bits, with the sign
    point = 1 - shifts[:, 0]
    zone = np.clip((point + PRICE * dearer / point) / 2, 0.5, 1.5)
    falling = np.log2((ones + larger) / larger)
    rounding = np.clip(0.5 + shifts[:, 1] - PRICE * falling / 2, 0.2, 0.5)
    return replace(quantiser, zone=zone.astype(np.float32), rounding=rounding.astype(np.float32))


def _counts_and_shifts(quantiser: Quantiser, coefficients: NDArray[np.float32]) -> tuple[Floats, NDArray[np.float32]]:
    """How many of a band's numbers have magnitude 0, 1 and more; and by how much values lie below 1, and below more.

    Shapes: -> (B, 3), (B, 2).
    """
    numbers = np.abs(_quantised(quantiser, coefficients))
    apart = np.empty(numbers.shape, np.float32)
    for row, of_row, sample in zip(apart, numbers, coefficients, strict=True):
        row[...] = of_row - np.abs(np.take(sample.ravel(), quantiser.order)) / quantiser.step
    num, counts, below = len(quantiser.zone), list[Floats](), list[Floats]()
    for chosen in (numbers == 0, numbers == 1, numbers > 1):
        counts.append(np.bincount(quantiser.bands, chosen.sum(axis=0), num).astype(np.float64))
        total = np.where(chosen, apart, 0).sum(axis=0)
        below.append(np.bincount(quantiser.bands, total, num) / np.maximum(counts[-1], 1))
    shifts = np.clip(np.stack(below[1:], axis=1), -0.5, 0.5)
    return np.stack(counts, axis=1), shifts.astype(np.float32)


def _quantised(quantiser: Quantiser, coefficients: NDArray[np.float32]) -> NDArray[np.int16]:
    """The numbers of samples, one by one, which takes little memory beside them. Shapes: [n, C, H, W] -> [n, ..]."""
    numbers = np.empty((len(coefficients), len(quantiser.order)), np.int16)
    for row, sample in zip(numbers, coefficients, strict=True):
        row[...] = quantiser.quantise(sample)
    return numbers


def _check(level: LevelSpec, features: NDArray[np.generic]) -> None:
    shape = (level.channels, level.height, level.width)
    if features.ndim != 4 or features.shape[1:] != shape or not len(features):
        raise ConfigError(
            f"codec transform of level {level.name} is fitted on samples of {list(shape)}; found {list(features.shape)}"
        )
    for idx, sample in enumerate(features):
        if not np.isfinite(sample).all():
            raise ConfigError(f"codec transform of level {level.name}: sample {idx} of the fit is not finite")


def _transformed(features: NDArray[np.generic], on_step: OnStep) -> tuple[ChannelBasis, Held]:
    """The basis of three in four samples, and what it makes of the others. With fewer than 8, of all."""
    num, shape = len(features), features.shape[1:]
    enough = num >= 2 * HELD_OUT
    held = np.flatnonzero(np.arange(num) % HELD_OUT == HELD_OUT - 1) if enough else np.arange(num)
    seen = np.setdiff1d(np.arange(num), held) if enough else held
    region = frequency_regions(shape[1], shape[2])
    basis = fit_basis(_normals(features, seen, on_step), shape[0], region)
    coefficients, lost = np.empty((len(held), *shape), np.float32), list[float]()
    for place, normal in enumerate(_normals(features, held, on_step)):
        coefficients[place] = of_sample = basis.forward(normal)
        if place < TURNED_BACK:
            lost.append(float(np.square(basis.inverse(of_sample) - normal).mean()))
    return basis, Held(coefficients, _deviation(coefficients, region), float(np.mean(lost)))


def _normals(features: NDArray[np.generic], chosen: NDArray[np.int64], on_step: OnStep) -> Iterator[Floats]:
    """Normalised samples, one by one."""
    for idx in chosen:
        on_step()
        yield normalise(features[idx].astype(np.float64))[0]


def _deviation(coefficients: NDArray[np.float32], region: NDArray[np.uint8]) -> Floats:
    """Root mean square of each coefficient, leaning on that of its component over the region by `LEANING` samples."""
    squares = np.square(coefficients, dtype=np.float64).sum(axis=0).reshape(coefficients.shape[1], -1)
    num = len(coefficients)
    for idx in range(int(region.max()) + 1):
        cells = region.ravel() == idx
        squares[:, cells] += LEANING * squares[:, cells].mean(axis=1, keepdims=True) / num
    return np.asarray(np.sqrt(squares / (num + LEANING)).reshape(coefficients.shape[1:]))


def _meet(held: Held, limit: float, on_step: OnStep) -> float:
    """The largest step within the error; half of what fine cutting would take, if that is too large already.

    Source: Brent, 1973; the logarithm of the error is nearly a line in that of the step.
    """
    seen: dict[float, float] = {}

    def excess(at: float) -> float:
        if at not in seen:
            on_step()
            found = _error(held, make_quantiser(held, float(np.exp(at))))
            seen[at] = float(np.log(max(found, LEAST_ERROR) / limit))
        return seen[at]

    low, high = np.log(STEPS)
    fine = np.sqrt(12 * limit)  # where all are finely cut, the error is step^2 / 12
    here = there = float(np.clip(np.log(fine / 2), low, high))
    while excess(there) <= 0 and there < high:
        here, there = there, min(there + STRIDE, float(high))
    if here < there and excess(there) > 0:
        brentq(excess, here, there, xtol=NEAR)
    return float(np.exp(max((at for at, value in seen.items() if value <= 0), default=here)))


def _error(held: Held, quantiser: Quantiser) -> float:
    squares = np.empty(held.coefficients.shape)
    for of_sample, sample in zip(squares, held.coefficients, strict=True):
        np.square(quantiser.restore(quantiser.quantise(sample)) - sample, out=of_sample)
    return float(squares.mean())


def _size(held: Held, quantiser: Quantiser, target: FitTarget) -> float:
    """Of a row and view, by the symbols of the samples that were kept."""
    symbols, tables = _symbols(held, quantiser)
    if target.entropy == "rans":
        return expected_bytes(symbols, tables) + NORM_BYTES
    if target.zstd_level == 0:
        return float(symbols.shape[1]) + NORM_BYTES
    zstd = Zstd(level=target.zstd_level)
    return float(np.mean([len(zstd.encode(row)) for row in symbols])) + NORM_BYTES


def _symbols(held: Held, quantiser: Quantiser) -> tuple[NDArray[np.int8], RansTables]:
    numbers = _quantised(quantiser, held.coefficients)
    wide = _num_wide(numbers, quantiser)
    symbols = to_symbols(numbers, wide)
    return symbols, fit_tables(symbols, symbol_classes(quantiser, wide), len(quantiser.zone) + 1)


def symbol_classes(quantiser: Quantiser, wide: int) -> NDArray[np.uint8]:
    """Which table each symbol has: that of its band, and one for all second bytes. Shapes: -> [n + wide]."""
    return np.append(quantiser.bands, np.full(wide, len(quantiser.zone), np.uint8))


def _num_wide(numbers: NDArray[np.int16], quantiser: Quantiser) -> int:
    """Coefficients up to the last band with a number that may not fit a byte; bands of large numbers come first."""
    wide = np.flatnonzero(np.abs(numbers).max(axis=0, initial=0) * ROOM > np.iinfo(np.int8).max)
    last = quantiser.bands[wide].max(initial=0)
    return int((quantiser.bands <= last).sum()) if len(wide) else 0


def _fit_of(basis: ChannelBasis, held: Held, quantiser: Quantiser, target: FitTarget) -> Fit:
    """Without the rows of the basis that no band has a coefficient of."""
    cut = cut_basis(basis, quantiser.band != NO_BAND)
    parameters = {
        "components": cut.components,
        "symbols": len(quantiser.order),
        "wide": _num_wide(_quantised(quantiser, held.coefficients), quantiser),
        "step": quantiser.step,
        "entropy": target.entropy,
    }
    arrays: dict[str, NDArray[np.generic]] = {
        "basis": cut.basis,
        "unit": cut.unit,
        "ranks": cut.ranks,
        "region": cut.region,
        "centre": cut.centre,
        "band": quantiser.band[: cut.components],
        "zone": quantiser.zone,
        "rounding": quantiser.rounding,
        "shift": quantiser.shift,
        "frequencies": _symbols(held, quantiser)[1].frequencies,
    }
    return Fit(parameters, arrays, _error(held, quantiser), _size(held, quantiser, target), held.fixed_mse)
