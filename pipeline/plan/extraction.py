"""What an extraction would take: bytes, error, time and memory, measured on a few real images before anything is
spent.

Nothing is written. Sizes are exact before compression; the compressed size, what codecs lose and the times come from
one batch. Codecs that are to be fitted are fitted to it on trial, for their times alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dtpipe.extract.cluster.preflight import free_bytes
from dtpipe.extract.config import ExtractConfig, ExtractRun
from dtpipe.extract.fitting.base import PLAIN_TARS, FitRequest, makes_plain_tars
from dtpipe.extract.fitting.sample import fit_memory_bytes
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.shards.queue import SHARDS_IN_HAND
from dtpipe.extract.shards.task import threads_that_code
from dtpipe.extract.sources.names import bounded, ignored_text
from dtpipe.extract.work import Work, refuse_lower_batch, work_of
from dtpipe.manifests.schema import Plan, Recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.plan import bytes_per_sample, plan_of
from dtpipe.pipeline.cli.console import Console, format_bytes, format_seconds
from dtpipe.pipeline.plan.arrays import (
    HEADERS,
    ArrayPlan,
    assume_codec,
    assumed_stage,
    norm_headers_bytes,
    print_arrays,
)
from dtpipe.pipeline.plan.limits import Limits, extraction_limits
from dtpipe.pipeline.plan.prices import CachedOrLive, PlanConfig, cached_or_live
from dtpipe.pipeline.plan.probe import peak_memory, probe, probe_rows, time_trial_fit

PRICES = PlanConfig()


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
    codec_s: float
    """Per image, by codecs where the teacher runs."""
    prepare_s: float
    """Per image, reading, decoding, resizing, one thread."""
    code_s: float
    """Per image, compression, checksums and digest, one thread."""
    decode_s: float
    """Per image and one view of each level: from bytes to what they are stored as, one thread, without the store."""
    restore_s: float
    """The same, from that to features, on the device."""
    binds: str
    """What lets through the fewest images."""
    limits: Limits
    seconds: float
    """The whole extraction, at the rate of what binds."""
    comparison: CachedOrLive
    """Cached features against a teacher that runs in every epoch."""
    memory_bytes: int
    """Peak of one worker: process with teacher and a batch, and the fit, or later the shards in hand."""
    device_bytes: int | None
    """Peak on the GPU; None on the CPU."""
    num_probed: int
    ignored: dict[str, int]
    """What lies in the source and is no sample: extension or why, to count."""
    to_fit: dict[str, Any] | None = None
    """What `extract` would fit before its plan; bytes here are assumed of it, times are of a fit to the probe."""


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
    rows, prepare_s = probe_rows(producer, listing, compute.batch_size)
    probed = probe(producer, plan, rows, compute)
    num_samples, workers = len(listing), _workers(run, recipe.compute.device)
    raw = bytes_per_sample(recipe.levels, len(recipe.views), _stored_image(recipe))
    arrays = _fitted_arrays(work, plan, probed.arrays)
    held_bytes = _held(run, raw * min(recipe.shard.samples, num_samples))
    fit_bytes = 0 if work.fit is None else fit_memory_bytes(recipe, work.fit, num_samples)
    memory_bytes = peak_memory() + max(held_bytes, fit_bytes)  # the fit is over before a shard is begun
    coding = probed.coding if work.fit is None else time_trial_fit(probed, recipe, work.fit, arrays)
    stored_each = sum(array.stored_bytes for array in arrays)
    limits = extraction_limits(
        on_gpu=recipe.compute.device != "cpu",
        workers=workers,
        cpus=os.cpu_count() or 1,
        decode_threads=run.decode_threads,
        code_threads=run.code_threads or threads_that_code(recipe.compute.device),
        teacher_s=probed.teacher_s + coding.codec_s,
        prepare_s=prepare_s,
        code_s=coding.code_s,
        stored_bytes=stored_each,
        store=store_speed(run.out, prices),
    )
    seconds = num_samples / limits.rate
    live_h = probed.teacher_s / len(recipe.views) * num_samples / 3600
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
        teacher_s=probed.teacher_s,
        codec_s=coding.codec_s,
        prepare_s=prepare_s,
        code_s=coding.code_s,
        decode_s=coding.decode_s,
        restore_s=coding.restore_s,
        binds=limits.binding,
        limits=limits,
        seconds=seconds,
        comparison=cached_or_live(prices, workers * seconds / 3600, stored_each * num_samples / 1e12, live_h, None),
        memory_bytes=memory_bytes,
        device_bytes=probed.device_bytes,
        num_probed=len(rows),
        ignored=dict(ignored),
        to_fit=None if work.fit is None else work.fit.record() | _remarks(recipe, work.fit),
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


def _remarks(recipe: Recipe, request: FitRequest) -> dict[str, str]:
    return {"remark": PLAIN_TARS} if makes_plain_tars(recipe, request) else {}


def _held(run: ExtractRun, shard_bytes: int) -> int:
    """Bytes of shards in hand, before compression: two, but within the setting, and one in any case."""
    return max(shard_bytes, min(SHARDS_IN_HAND * shard_bytes, round(run.memory_gb * 1e9)))


def store_speed(url: str, prices: PlanConfig) -> tuple[str, float]:
    """What a dataset lies on, and the MB/s that the settings give it."""
    local = Store(url).local is not None
    return ("disk", prices.disk_mb_s) if local else ("network", prices.network_mb_s)


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
            f"codecs {_ms(plan.codec_s)}, compress {_ms(plan.code_s)}",
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
        "anything is stored; the bytes below are assumed of them; the times above are of a fit to a few samples, and "
        f"the fit itself is not in them{f'; {remark}' if (remark := fit.get('remark')) else ''}"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
