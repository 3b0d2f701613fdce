"""From a sample of features to codecs: for an error of each level, or for a size of the whole dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.fitting.base import PLAIN_TARS, FitRequest, FitResult, OnFitted, makes_plain_tars
from dtpipe.extract.fitting.budget import CURVE_ERRORS, Curve, budget_too_small, divide
from dtpipe.extract.fitting.sample import MEASURED, FitSample, chosen_rows, read_sample, sample_plan
from dtpipe.extract.shards.producer import Job
from dtpipe.manifests.codecs.base import array_name, encode_level
from dtpipe.manifests.codecs.fit import Fit, FitTarget
from dtpipe.manifests.codecs.fitted import FITTED, HeldFitted, encode_fitted
from dtpipe.manifests.codecs.registry import CODECS, level_codecs
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.layout.arrays import ShardArrays, stored_arrays
from dtpipe.manifests.schema import IMAGE, CodecSpec, LevelSpec, Recipe
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import plan_of
from dtpipe.manifests.write.shard import encode_shard
from dtpipe.manifests.write.size import foretell_size

_FEW: Final = 64  # samples; a basis of fewer is said to be one
_CURVE_SAMPLES: Final = 128  # that sizes at several errors are measured on
_ROOM: Final = 0.98  # of a budget; the sample is not the whole
_LESS: Final = 0.99  # of it in each round, since sizes between those that were tried are not exact
_ROUNDS: Final = 8  # so often a budget is divided again by what was measured
"""Stored bytes have parts that a fit does not see: images, headers, checksums."""
_ABOVE: Final = 2  # times what a codec loses in any steps, an error may be asked for


@dataclass(frozen=True)
class FitTask:
    """A whole fit, for any process; small."""

    draft: Recipe
    """Levels that are to be fitted have no codec there yet."""
    request: FitRequest
    job: Job
    listing: Listing
    """Of the rows that are looked at."""
    num_rows: int
    """Of the whole dataset."""
    decode_threads: int

    def run(self, device: str, on_fitted: OnFitted) -> FitResult:
        """Read the sample and fit. Raises: as `read_sample`; ConfigError when no codec meets the request."""
        sample = read_sample(self.draft, self.listing, self.job, device, self.decode_threads, on_fitted)
        result = fit_codecs(self.draft, sample, self.request, self.num_rows, on_fitted)
        refuse_too_little(self.request, result.least_mse)
        return result


def fit_task(draft: Recipe, listing: Listing, request: FitRequest, job: Job, decode_threads: int) -> FitTask:
    """The fit of a dataset that is to begin."""
    return FitTask(draft, request, job, chosen_rows(draft, listing, request), len(listing), decode_threads)


def fit_codecs(draft: Recipe, sample: FitSample, request: FitRequest, num_rows: int, on_fitted: OnFitted) -> FitResult:
    """Codecs of the levels that a request names. Raises: ConfigError when none meets it."""
    fits = _Fits(draft, sample, request, on_fitted)
    if request.budget_bytes is None:
        assert request.max_error is not None
        return fits.result(dict.fromkeys(request.codecs, request.max_error))
    return fits.within(request.budget_bytes, num_rows)


def refuse_too_little(request: FitRequest, least_mse: Mapping[str, float]) -> None:
    """See that no smaller error is asked for than codecs can keep. Raises: ConfigError."""
    for name, least in least_mse.items():
        if request.max_error is not None and request.max_error <= least:
            raise ConfigError(
                f"extract.codec.max_error is {request.max_error:g}, and level {name} under {request.codecs[name]} "
                f"loses {least / _ABOVE:.2g} in any steps, since what was fitted is rounded; ask for {1.1 * least:.2g} "
                f"or more, or store it under -s extract.codec.levels.{name}=int8 or cast"
            )


class _Fits:
    """Fits of one sample."""

    def __init__(self, draft: Recipe, sample: FitSample, request: FitRequest, on_fitted: OnFitted) -> None:
        self._draft, self._sample, self._request, self._on_fitted = draft, sample, request, on_fitted
        self._levels = {level.name: level for level in draft.levels if level.name in request.codecs}
        self._kept: dict[str, Callable[[float], Fit]] = {}

    def result(self, errors: Mapping[str, float]) -> FitResult:
        """Each level fitted for its error."""
        codecs, files, expected, least = {}, {}, {}, {}
        for name, level in self._levels.items():
            fit = self._of_all(level)(errors[name])
            digest, data = encode_fitted(fit.arrays)
            files[digest] = data
            codecs[name] = CodecSpec(name=self._request.codecs[name], parameters={**fit.parameters, FITTED: digest})
            expected[name] = {"relative_mse": float(fit.relative_mse), "size_bytes": float(fit.size_bytes)}
            least[name] = _ABOVE * fit.fixed_mse
            self._say(f"level {name} is fitted: {_percent(fit.relative_mse)} error, {_ratio(level, fit.size_bytes)}")
        return FitResult(codecs, files, expected, len(self._sample.rows), self._remarks(), least)

    def _remarks(self) -> tuple[str, ...]:
        num = len(self._sample.rows)
        few = f"codecs were fitted to {count_of(num, 'sample')} only, which may be too few for others like them"
        plain = makes_plain_tars(self._draft, self._request)
        return (*([few] if num < _FEW else ()), *([PLAIN_TARS] if plain else ()))

    def within(self, budget_bytes: int, num_rows: int) -> FitResult:
        """The least error, added over levels, within bytes of the whole dataset: one price of a byte for all levels."""
        num_views = len(self._draft.views)
        view_bytes = _ROOM * budget_bytes / num_rows / num_views
        curves = {name: self._curve(level) for name, level in self._levels.items()}
        coarsest = dict.fromkeys(curves, CURVE_ERRORS[-1])
        beside = 0.0  # images, headers, tables, bases, levels that are not fitted
        for tried in range(_ROUNDS):
            errors = divide(curves, (view_bytes - beside) * _LESS**tried) if tried < _ROUNDS - 1 else None
            result = self.result(errors or coarsest)
            stored = self._dataset_bytes(result, num_rows) / num_rows / num_views
            if stored <= view_bytes:
                return result
            if errors is None:
                break
            beside = stored - sum(level["size_bytes"] for level in result.expected.values())
        raise budget_too_small(budget_bytes, num_rows, stored * num_views)

    def _curve(self, level: LevelSpec) -> Curve:
        """Sizes of a level at several errors."""
        fit = self._fits(level, self._sample.levels[level.name][:_CURVE_SAMPLES])
        fits = [fit(error) for error in CURVE_ERRORS]
        self._say(f"level {level.name} was tried at {len(fits)} errors")
        return Curve(tuple(fit.coded_mse for fit in fits), tuple(fit.size_bytes for fit in fits))

    def _of_all(self, level: LevelSpec) -> Callable[[float], Fit]:
        """Fits by the whole sample; kept for a budget, which takes several rounds of them."""
        if level.name in self._kept:
            return self._kept[level.name]
        fits = self._fits(level, self._sample.levels[level.name])
        if self._request.budget_bytes is not None:
            self._kept[level.name] = fits
        return fits

    def _fits(self, level: LevelSpec, features: NDArray[np.float32]) -> Callable[[float], Fit]:
        """Fits of a level for any error; what they share is made once."""
        fit = CODECS[self._request.codecs[level.name]].fit
        assert fit is not None, "only codecs that are fitted are asked for"
        in_zarr = self._draft.shard.format == "zarr"
        zstd_level = self._draft.codec.level_of(sparse=True) if in_zarr else 0  # tars hold plain npy
        of_target = fit(level, features, self._go_on)
        coder = self._request.coder
        return lambda error: of_target(FitTarget(relative_mse=error, entropy=coder, zstd_level=zstd_level))

    def _dataset_bytes(self, result: FitResult, num_rows: int) -> float:
        """Of a whole dataset of so many rows, by the sample of the fit."""
        recipe = result.recipe(self._draft)
        num = min(len(self._sample.rows), MEASURED)
        plan = sample_plan(recipe, num)
        held = HeldFitted(result.files)
        codecs = level_codecs(recipe, held)
        arrays = {name: np.zeros(spec.shape(num), spec.dtype) for name, spec in stored_arrays(recipe).items()}
        if self._sample.images is not None:
            arrays[IMAGE][...] = self._sample.images[:num]
        for name, codec in codecs.items():
            for row, features in enumerate(self._sample.levels[name][:num]):
                for part, values in encode_level(codec, features).items():
                    arrays[array_name(name, part)][row] = values
        rows = [row.model_copy(update={"row": idx}) for idx, row in enumerate(self._sample.rows[:num])]
        objects = list(encode_shard(plan, 0, ShardArrays(arrays, rows), held))
        return foretell_size(plan_of(recipe, num_rows), objects, rows, result.files).total

    def _say(self, what: str | None) -> None:
        num = len(self._sample.rows)
        self._on_fitted(num, num, what)

    def _go_on(self) -> None:
        """Within a level."""
        self._say(None)


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.0%}"


def _ratio(level: LevelSpec, size_bytes: float) -> str:
    raw = level.channels * level.height * level.width * np.dtype(level.dtype).itemsize
    return f"{size_bytes:.0f} of {raw} bytes a view, {raw / max(size_bytes, 1):.1f}x"
