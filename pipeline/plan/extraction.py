"""What an extraction would take: bytes, error, time and memory, measured on a few real images before anything is
spent.

Nothing is written. Sizes are exact before compression; the compressed size, what codecs lose and the times come from
one batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dtpipe.extract.cluster.preflight import free_bytes
from dtpipe.extract.config import ExtractConfig, ExtractRun
from dtpipe.extract.device import NOTHING_YET
from dtpipe.extract.fitting.sample import sample_plan
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.shards.buffer import CodedBatch
from dtpipe.extract.shards.producer import PreparedRow, Producer
from dtpipe.extract.shards.queue import SHARDS_IN_HAND
from dtpipe.extract.shards.task import threads_that_code
from dtpipe.extract.sources.names import bounded, ignored_text
from dtpipe.extract.work import Work, refuse_lower_batch, work_of
from dtpipe.manifests.codecs.base import LevelCodec, decode_level, parts_of
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import InputError, saying_what_to_lower
from dtpipe.manifests.layout.arrays import CodedRows, ShardArrays, stored_arrays
from dtpipe.manifests.pieces import blake3_of
from dtpipe.manifests.schema import ComputeRecipe, IndexRow, Plan, Recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import bytes_per_sample, plan_of
from dtpipe.manifests.write.shard import SHARD_FORMATS, encode_rows, join_rows
from dtpipe.manifests.write.size import foretell_size
from dtpipe.pipeline.cli.console import Console, format_bytes, format_seconds
from dtpipe.pipeline.plan.arrays import (
    HEADERS,
    ArrayPlan,
    assume_codec,
    assumed_stage,
    norm_headers_bytes,
    plan_arrays,
    print_arrays,
)
from dtpipe.pipeline.plan.limits import Limits, extraction_limits
from dtpipe.pipeline.plan.prices import CachedOrLive, PlanConfig, cached_or_live

PRICES = PlanConfig()
PROBE_TRIES = 4  # times the probe's images that are looked at to find good ones


@dataclass(frozen=True)
class ExtractionPlan:
    """What one extraction would take. Bytes, seconds; `workers` as the settings or this machine say."""

    num_samples: int
    num_shards: int
    samples_per_shard: int
    views: int
    levels: dict[str, int]
    """Raw bytes per sample of each level, all views, and of the image."""
    raw_bytes: int
    stored_bytes: int
    """Estimate after compression, from the probe."""
    arrays: tuple[ArrayPlan, ...]
    """Bytes and error of each level, and of the image."""
    free_bytes: int | None
    device: str
    workers: int
    teacher_s: float
    """Per image, teacher only."""
    prepare_s: float
    """Per image, reading, decoding, resizing, one thread."""
    code_s: float
    """Per image, compression, checksums and digest, one thread."""
    decode_s: float
    """Per image and one view of each level: what reading them back takes, one thread, without the store; 0 where codecs
    are to be fitted."""
    binds: str
    """What lets through the fewest images."""
    limits: Limits
    seconds: float
    """The whole extraction, at the rate of what binds."""
    comparison: CachedOrLive
    """Cached features against a teacher that runs in every epoch."""
    memory_bytes: int
    """Peak of one worker: process with teacher and a batch, and the shards in hand."""
    device_bytes: int | None
    """Peak on the GPU; None on the CPU."""
    num_probed: int
    ignored: dict[str, int]
    """What lies in the source and is no sample: extension or why, to count."""
    to_fit: dict[str, Any] | None = None
    """What `extract` would fit before its plan; bytes here are assumed of it, times are of these levels under cast."""


def plan_extraction(config: ExtractConfig, prices: PlanConfig = PRICES) -> ExtractionPlan:
    """The plan of `plan_recipe` alone."""
    return plan_recipe(config, prices)[0]


def plan_recipe(config: ExtractConfig, prices: PlanConfig = PRICES) -> tuple[ExtractionPlan, Recipe]:
    """Resolve the recipe, run the teacher over one batch of real images, and scale up.

    Raises: what `extract` would raise before work: ConfigError, InputError, TeacherError.
    """
    here = config.run.model_copy(update={"inline": True})
    resolved = resolve_recipe(config.model_copy(update={"run": here}))
    work = work_of(resolved)
    return plan_work(work, config.run, bounded(resolved.source.ignored()), prices), work.recipe


def plan_work(work: Work, run: ExtractRun, ignored: Mapping[str, int], prices: PlanConfig = PRICES) -> ExtractionPlan:
    """What any work would take: its own producer makes one batch of its rows.

    Raises: InputError when none of its first rows can be used, ConfigError for a budget that cannot be met, and what
    the producer raises.
    """
    recipe, listing = work.recipe, work.listing()
    plan = plan_of(recipe, len(listing))
    producer = work.job_here.open(plan, listing, recipe.compute.device)
    refuse_lower_batch(run, Store(run.out))
    compute = recipe.compute.in_batches(run.lower_batch_to or recipe.compute.batch_size)
    rows, prepare_s = _probe_rows(producer, listing, compute.batch_size)
    probe = _probe(producer, plan, rows, compute)
    num_samples, workers = len(listing), _workers(run, recipe.compute.device)
    arrays = _fitted_arrays(work, plan, probe.arrays)
    stored_each = sum(array.stored_bytes for array in arrays)
    limits = extraction_limits(
        on_gpu=recipe.compute.device != "cpu",
        workers=workers,
        cpus=os.cpu_count() or 1,
        decode_threads=run.decode_threads,
        code_threads=run.code_threads or threads_that_code(recipe.compute.device),
        teacher_s=probe.teacher_s,
        prepare_s=prepare_s,
        code_s=probe.code_s,
        stored_bytes=stored_each,
        store=store_speed(run.out, prices),
    )
    seconds = num_samples / limits.rate
    live_h = probe.teacher_s / len(recipe.views) * num_samples / 3600
    raw = bytes_per_sample(recipe.levels, len(recipe.views), _stored_image(recipe))
    return ExtractionPlan(
        num_samples=num_samples,
        num_shards=plan.num_shards,
        samples_per_shard=recipe.shard.samples,
        views=len(recipe.views),
        levels=_bytes_by_array(recipe),
        raw_bytes=raw * num_samples,
        stored_bytes=round(stored_each * num_samples),
        arrays=arrays,
        free_bytes=free_bytes(Store(run.out)),
        device=recipe.compute.device,
        workers=workers,
        teacher_s=probe.teacher_s,
        prepare_s=prepare_s,
        code_s=probe.code_s,
        decode_s=probe.decode_s if work.fit is None else 0.0,
        binds=limits.binding,
        limits=limits,
        seconds=seconds,
        comparison=cached_or_live(prices, workers * seconds / 3600, stored_each * num_samples / 1e12, live_h, None),
        memory_bytes=peak_memory() + _held(run, raw * min(recipe.shard.samples, num_samples)),
        device_bytes=probe.device_bytes,
        num_probed=len(rows),
        ignored=dict(ignored),
        to_fit=None if work.fit is None else work.fit.record(),
    )


def _fitted_arrays(work: Work, plan: Plan, arrays: tuple[ArrayPlan, ...]) -> tuple[ArrayPlan, ...]:
    """What arrays take once codecs are fitted, as far as that can be said before. Raises: as `assume_codec`."""
    if work.fit is None:
        return arrays
    stage, more = assumed_stage(work.recipe, work.fit.coder), len(work.fit.codecs) * norm_headers_bytes(plan)
    with_norms = [
        replace(array, stored_bytes=array.stored_bytes + more) if array.name == HEADERS else array for array in arrays
    ]
    return assume_codec(with_norms, work.fit.codecs, work.fit.max_error, work.fit.budget_bytes, plan.num_rows, stage)


def _held(run: ExtractRun, shard_bytes: int) -> int:
    """Bytes of shards in hand, before compression: two, but within the setting, and one in any case."""
    return max(shard_bytes, min(SHARDS_IN_HAND * shard_bytes, round(run.memory_gb * 1e9)))


def store_speed(url: str, prices: PlanConfig) -> tuple[str, float]:
    """What a dataset lies on, and the MB/s that the settings give it."""
    local = Store(url).local is not None
    return ("disk", prices.disk_mb_s) if local else ("network", prices.network_mb_s)


def _probe_rows(producer: Producer, listing: Listing, num: int) -> tuple[list[PreparedRow], float]:
    """The first good rows of the listing, numbered from 0, and the seconds per row it took to prepare them."""
    rows: list[PreparedRow] = []
    started = time.perf_counter()
    for row in range(min(len(listing), PROBE_TRIES * num)):
        prepared = producer.prepare(IndexRow(row=row, key=listing.keys[row], shard=0))
        if prepared.content is not None:
            rows.append(prepared)
        if len(rows) == num:
            break
    if not rows:
        raise InputError(
            f"none of the first {PROBE_TRIES * num} samples can be used, such as {listing.keys[0]!r}; look at it"
        )
    return rows, (time.perf_counter() - started) / len(rows)


@dataclass(frozen=True)
class _Probe:
    """One batch, from images to bytes and back. Seconds are of one image."""

    arrays: tuple[ArrayPlan, ...]
    teacher_s: float
    code_s: float
    decode_s: float
    device_bytes: int | None


def _probe(producer: Producer, plan: Plan, rows: Sequence[PreparedRow], compute: ComputeRecipe) -> _Probe:
    """A full batch after warm-up; the codec counts with the teacher, since it runs on the same device.

    Raises: DeviceMemoryError where there is no room for it.
    """
    import torch

    from dtpipe.extract.teachers.arithmetic import exact

    recipe, codecs = plan.recipe, level_codecs(plan.recipe)
    if compute.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    no_room = saying_what_to_lower("a first batch", compute.device, compute.batch_size, NOTHING_YET)
    with exact(torch.device(compute.device), compute.threads), no_room:
        producer.produce(rows, compute.batch_size)
        started_s = time.perf_counter()
        produced = producer.produce(rows, compute.batch_size)
        batch = CodedBatch([prepared.index for prepared in rows], produced.images)
        batch.start(produced.levels, codecs)
        batch.wait()
        teacher_s = (time.perf_counter() - started_s) / compute.batch_size
    arrays = batch.arrays(recipe)
    _warm_up(recipe, codecs, arrays)
    started_s = time.perf_counter()
    coded = encode_rows(recipe, arrays)
    blake3_of(chunk.data for chunks in coded.chunks.values() for chunk in chunks)
    code_s = (time.perf_counter() - started_s) / len(rows)
    numbered = [row.model_copy(update={"row": idx}) for idx, row in enumerate(coded.rows)]  # bad ones were left out
    objects = list(join_rows(sample_plan(recipe, len(rows)), 0, [replace(coded, rows=numbered)]))
    size = foretell_size(plan, objects, numbered, {})
    features = {name: level[: len(rows)].float().cpu().numpy() for name, level in produced.levels.items()}
    return _Probe(
        arrays=plan_arrays(plan, codecs, arrays, coded, size, features),
        teacher_s=teacher_s,
        code_s=code_s,
        decode_s=_time_decoding(recipe, codecs, coded),
        device_bytes=torch.cuda.max_memory_allocated() if compute.device == "cuda" else None,
    )


def _warm_up(recipe: Recipe, codecs: Mapping[str, LevelCodec], arrays: ShardArrays) -> None:
    """Code one row and decode it, so that loading compiled code is in no time."""
    row = ShardArrays({name: values[:1] for name, values in arrays.arrays.items()}, arrays.rows[:1])
    _time_decoding(recipe, codecs, encode_rows(recipe, row))


def _time_decoding(recipe: Recipe, codecs: Mapping[str, LevelCodec], coded: CodedRows) -> float:
    """Seconds to get one row back from its bytes: the image, and one view of each level."""
    form, specs = SHARD_FORMATS[recipe.shard.format], stored_arrays(recipe)
    started_s = time.perf_counter()
    plain = {}
    for name, spec in specs.items():
        chunk = coded.chunks[name][0]
        plain[name] = np.empty(spec.chunk_shape, spec.dtype)
        trailer = chunk.crc32c.to_bytes(form.trailer_bytes, "little") if form.trailer_bytes else b""
        form.decode(spec, chunk.data, trailer, plain[name])
    for codec in codecs.values():
        decode_level(codec, parts_of(codec, plain))
    return time.perf_counter() - started_s


def _bytes_by_array(recipe: Recipe) -> dict[str, int]:
    sizes = {} if recipe.images == "joined" else {"image": 3 * recipe.transform.height * recipe.transform.width}
    return sizes | {level.name: bytes_per_sample((level,), len(recipe.views), None) for level in recipe.levels}


def _stored_image(recipe: Recipe) -> tuple[int, int] | None:
    return None if recipe.images == "joined" else (recipe.transform.height, recipe.transform.width)


def _workers(run: ExtractRun, device: str) -> int:
    """Actors there would be on this machine; a cluster's size is not asked for."""
    if run.inline:
        return 1
    if run.workers is not None:
        return run.workers
    import os

    import torch

    return max(1, torch.cuda.device_count() if device == "cuda" else (os.cpu_count() or 2) // 2)


def peak_memory() -> int:
    """The most memory this process has held so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def print_extraction(console: Console, plan: ExtractionPlan) -> None:
    """The plan as lines; as one document with --json."""
    free = "" if plan.free_bytes is None else f"; {format_bytes(plan.free_bytes)} are free there"
    raw = f"{format_bytes(plan.raw_bytes)} before compression, {plan.raw_bytes / max(plan.stored_bytes, 1):.2f}x"
    workers = f"{plan.workers} worker{'s' if plan.workers > 1 else ''} ({plan.device})"
    console.pairs(
        {
            "samples": f"{plan.num_samples} in {count_of(plan.num_shards, 'shard')} of {plan.samples_per_shard}",
            "bytes": f"about {format_bytes(plan.stored_bytes)} ({raw}){free}",
            "time": f"about {format_seconds(plan.seconds)} on {workers}",
            "limits": plan.limits.text(),
            "per image": f"teacher {_ms(plan.teacher_s)}, decode and resize {_ms(plan.prepare_s)}, "
            f"compress {_ms(plan.code_s)}",
            "memory": f"about {format_bytes(plan.memory_bytes)} per worker"
            + (f", {format_bytes(plan.device_bytes)} on the GPU" if plan.device_bytes is not None else ""),
        }
    )
    if plan.to_fit is not None:
        console.result(_fit_in_words(plan.to_fit))
    console.result()
    print_arrays(console, plan.arrays, plan.num_samples, plan.views, plan.num_probed)
    console.result()
    if plan.ignored:
        console.result(f"ignored: {ignored_text(plan.ignored)}")
    console.result(f"measured on {plan.num_probed} of the images; nothing was written")
    if plan.free_bytes is not None and plan.stored_bytes > plan.free_bytes:
        console.result("warning: that does not fit; store fewer levels or views, or write to another place")


def _fit_in_words(fit: dict[str, Any]) -> str:
    levels = ", ".join(f"{name} {codec}" for name, codec in fit["levels"].items())
    target = f"{fit['max_error']:.1%} error" if "max_error" in fit else format_bytes(fit["budget_bytes"])
    return (
        f"codecs ({levels}) would be fitted for {target} to {count_of(fit['samples'], 'sample')} at most, before "
        "anything is stored; the bytes below are assumed of them; fitting, and coding by them, are not in the time "
        "above"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
