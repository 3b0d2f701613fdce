"""Bytes and error of each array of a dataset to come: measured on a probe, or assumed before a codec is fitted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from tarfile import BLOCKSIZE
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.fitting.budget import CURVE_ERRORS, budget_too_small
from dtpipe.manifests.codecs.base import LevelCodec, decode_level, parts_of
from dtpipe.manifests.codecs.transform_fit import NORM_BYTES
from dtpipe.manifests.fidelity import Fidelity
from dtpipe.manifests.layout.arrays import CodedRows, ShardArrays, stored_arrays
from dtpipe.manifests.layout.zarr import SLOT_BYTES, TRAILER_BYTES
from dtpipe.manifests.schema import IMAGE, Plan, Recipe, ViewSpec
from dtpipe.manifests.write.size import DatasetBytes
from dtpipe.pipeline.cli.console import Console, format_bytes, format_error

_FAST: Final = 10  # level of zstd up to which it looks for little
HEADERS: Final = "headers"  # of objects and members, keys, and tables of chunks
BESIDE: Final = "files"  # beside the shards: entries, tables, records
ASSUMED_RATIOS: Final = {0.01: 5.23, 0.03: 7.63, 0.06: 10.84, 0.1: 15.33}
"""Features in float16 over stored bytes, by relative squared error, of codec transform: `benchmarks/codec.py`."""
ASSUMED_BY_STAGE: Final = {
    "zstd 3": ASSUMED_RATIOS,
    "zstd 12": {0.01: 5.71, 0.03: 8.72, 0.06: 12.75, 0.1: 18.22},
    "rans": {0.01: 7.01, 0.03: 11.03, 0.06: 16.42, 0.1: 23.76},
    "npy": {0.01: 1.88, 0.03: 1.9, 0.06: 2.05, 0.1: 2.26},
}
"""The same by what makes bytes of symbols; `npy` does nothing, in tars, whose headers are not in it."""


@dataclass(frozen=True)
class ArrayPlan:
    """One level with all its arrays, or the image. Bytes are of one sample, all views."""

    name: str
    codec: str
    raw_bytes: int
    """As features in the level's dtype, or as uint8."""
    stored_bytes: float
    read_bytes: float
    """Of these, what an epoch of training reads: one view."""
    error: float | None
    """Share of the whitened features' variance that is lost; None of images, which are exact."""
    assumed: str | None = None
    """What made the bytes that are assumed, where the codec is not fitted yet; None: all was measured."""
    apart: float | None = None
    """Variance of whitened features over noise draws of one image, which a codec's error compares with; None of images
    and of single draws."""


def plan_arrays(
    plan: Plan,
    codecs: Mapping[str, LevelCodec],
    arrays: ShardArrays,
    coded: CodedRows,
    size: DatasetBytes,
    features: Mapping[str, NDArray[np.generic]],
) -> tuple[ArrayPlan, ...]:
    """From a probe: its features, and what their codecs and the store made of them; `size` of the whole dataset.

    Shapes: features {level: [n, V, C, h, w]}.
    """
    recipe = plan.recipe
    num, views = len(coded.rows), len(recipe.views)
    sizes = {name: sum(len(chunk.data) for chunk in chunks) / num for name, chunks in coded.chunks.items()}
    plans = []
    if recipe.images == "stored":
        raw = 3 * recipe.transform.height * recipe.transform.width
        plans.append(ArrayPlan(IMAGE, "exact", raw, sizes[IMAGE], sizes[IMAGE], None))
    specs = stored_arrays(recipe).values()
    for level in recipe.levels:
        stored = sum(sizes[spec.name] for spec in specs if spec.level == level.name)
        raw = views * level.channels * level.height * level.width * np.dtype(level.dtype).itemsize
        decoded = decode_level(codecs[level.name], parts_of(codecs[level.name], arrays.arrays))
        shape = (-1, level.channels, level.height, level.width)
        error = Fidelity.of(features[level.name].reshape(shape), decoded.reshape(shape)).relative_mse
        apart = draws_apart(features[level.name], recipe.views)
        plans.append(ArrayPlan(level.name, level.codec.name, raw, stored, stored / views, error, apart=apart))
    headers = size.objects / plan.num_rows - sum(array.stored_bytes for array in plans)
    beside = {HEADERS: headers, BESIDE: size.files / plan.num_rows}
    return (*plans, *(ArrayPlan(name, "", 0, stored, 0.0, None) for name, stored in beside.items()))


def draws_apart(features: NDArray[np.generic], views: Sequence[ViewSpec]) -> float | None:
    """Variance of a level's whitened features over noise draws that share all else: half the squared distance of
    neighbouring ones. Shapes: [n, V, C, h, w].
    """
    kinds: dict[tuple[int | None, bool], list[int]] = {}
    for idx, view in enumerate(views):
        kinds.setdefault((view.timestep, view.flip), []).append(idx)
    pairs = [pair for of_kind in kinds.values() for pair in pairwise(of_kind)]
    distances = [Fidelity.of(features[:, one], features[:, other]).relative_mse for one, other in pairs]
    return statistics.fmean(distances) / 2 if pairs else None


def norm_headers_bytes(plan: Plan) -> float:
    """What the norms of a level under `transform` take of a sample, beside their numbers: slots or members."""
    views, shard = len(plan.recipe.views), plan.recipe.shard
    if shard.format == "webdataset":
        return views * (2 * BLOCKSIZE - NORM_BYTES)
    return views * (TRAILER_BYTES + SLOT_BYTES * plan.num_shards * shard.samples / plan.num_rows)


def assume_codec(
    plans: Sequence[ArrayPlan],
    codecs: Mapping[str, str],
    max_error: float | None,
    budget_bytes: int | None,
    num_samples: int,
    stage: str = "zstd 3",
) -> tuple[ArrayPlan, ...]:
    """Plans in which some levels, {name: codec}, are coded for an error, or for bytes of the whole dataset.

    `stage` is one of `ASSUMED_BY_STAGE`. Between the measured ratios, the logarithm of the error is taken as linear in
    that of the ratio.
    Raises: ConfigError where not even the largest error that a fit tries comes within the budget.
    """
    if budget_bytes is not None:
        error, ratio = _within(plans, codecs, budget_bytes, num_samples, stage)
    else:
        assert max_error is not None
        error, ratio = max_error, assumed_ratio(max_error, stage)

    def coded(plan: ArrayPlan) -> ArrayPlan:
        if plan.name not in codecs:
            return plan
        stored = plan.raw_bytes / ratio
        read = stored * plan.read_bytes / plan.stored_bytes
        return replace(plan, codec=codecs[plan.name], stored_bytes=stored, read_bytes=read, error=error, assumed=stage)

    return tuple(coded(plan) for plan in plans)


def _within(
    plans: Sequence[ArrayPlan], codecs: Mapping[str, str], budget_bytes: int, num_samples: int, stage: str
) -> tuple[float, float]:
    """Error and ratio of the levels that are coded. Raises: as `assume_codec`."""
    raw = sum(plan.raw_bytes for plan in plans if plan.name in codecs)
    beside = sum(plan.stored_bytes for plan in plans if plan.name not in codecs)
    left, least = budget_bytes / num_samples - beside, raw / assumed_ratio(CURVE_ERRORS[-1], stage)
    if left < least:
        raise budget_too_small(budget_bytes, num_samples, beside + least)
    return assumed_error(raw / left, stage), raw / left


def assumed_stage(recipe: Recipe, coder: str) -> str:
    """What makes bytes of the symbols of a recipe, of `ASSUMED_BY_STAGE`."""
    if coder == "zstd" and recipe.shard.format != "zarr":
        return "npy"
    return coder if coder == "rans" else "zstd 12" if recipe.codec.level_of(sparse=True) > _FAST else "zstd 3"


def assumed_ratio(error: float, stage: str = "zstd 3") -> float:
    """Compression at an error."""
    errors, ratios = zip(*sorted(ASSUMED_BY_STAGE[stage].items()), strict=True)
    return _interpolated(error, errors, ratios)


def assumed_error(ratio: float, stage: str = "zstd 3") -> float:
    """Inverse of `assumed_ratio`; at most 1, all of the variance."""
    errors, ratios = zip(*sorted(ASSUMED_BY_STAGE[stage].items()), strict=True)
    return min(1.0, _interpolated(ratio, ratios, errors))


def _interpolated(value: float, known: Sequence[float], wanted: Sequence[float]) -> float:
    """Linear between the logarithms of points, and beyond them as in the nearest two."""
    logs = [math.log(point) for point in known]
    at = min(max(sum(point < math.log(value) for point in logs), 1), len(logs) - 1)
    share = (math.log(value) - logs[at - 1]) / (logs[at] - logs[at - 1])
    first, second = math.log(wanted[at - 1]), math.log(wanted[at])
    return math.exp(first + share * (second - first))


def print_arrays(
    console: Console, plans: Sequence[ArrayPlan], num_samples: int, num_views: int, num_probed: int
) -> None:
    """Level by level: codec, bytes, error and total."""
    rows = [_row(plan.name, plan.codec, plan.raw_bytes, plan.stored_bytes, plan.error, num_samples) for plan in plans]
    raw, stored = sum(plan.raw_bytes for plan in plans), sum(plan.stored_bytes for plan in plans)
    rows.append(_row("all", "", raw, stored, None, num_samples))
    console.table(("array", "codec", "per sample", "stored", "ratio", "error", "in all"), rows)
    if assumed := {plan.name: plan.assumed for plan in plans if plan.assumed}:
        stage = next(iter(assumed.values()))
        console.result(
            f"stored and error of {', '.join(assumed)} are ASSUMED, as measured on all levels of the demo's teacher "
            f"(64 px, {stage}): the codec is fitted when the extraction begins, and its bases, in codecs/, come on top"
        )
    views = "" if num_views == 1 else f"; {num_views} views of each level"
    console.result(f"error: share of the whitened features' variance that is lost; {num_probed} images{views}")
    if said := draws_in_words(plans):
        console.result(said)


def draws_in_words(plans: Sequence[ArrayPlan]) -> str | None:
    """How far draws lie apart, and which levels a codec changes by more; None where no level has several."""
    apart = {plan.name: plan.apart for plan in plans if plan.apart is not None}
    if not apart:
        return None
    said = ", ".join(f"{name} {format_error(share)}" for name, share in apart.items())
    coarse = [plan.name for plan in plans if plan.apart is not None and (plan.error or 0) > plan.apart]
    lost = f"; codecs lose more than that of {', '.join(coarse)}: more draws of these say little new" if coarse else ""
    return f"draws: noise draws of one image differ by {said} of that variance{lost}"


def _row(name: str, codec: str, raw: float, stored: float, error: float | None, num_samples: int) -> tuple[str, ...]:
    shown = "" if error is None else format_error(error)
    ratio = f"{raw / max(stored, 1):.2f}" if raw else ""
    return (
        name,
        codec,
        format_bytes(raw) if raw else "",
        format_bytes(stored),
        ratio,
        shown,
        format_bytes(stored * num_samples),
    )
