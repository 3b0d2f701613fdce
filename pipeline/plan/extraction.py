"""What an extraction would take: bytes, time and memory, measured on a few real images before anything is spent.

Nothing is written. Sizes are exact before compression; the compressed size and the times come from one batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtpipe.extract.cluster.preflight import free_bytes
from dtpipe.extract.config import ExtractConfig, ExtractRun
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.shards.buffer import CodedBatch
from dtpipe.extract.shards.producer import PreparedRow, Producer
from dtpipe.extract.shards.queue import SHARDS_IN_HAND
from dtpipe.extract.sources.names import bounded, ignored_text
from dtpipe.extract.work import Work, work_of
from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.pieces import blake3_of
from dtpipe.manifests.schema import IndexRow, Plan, Recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import bytes_per_sample
from dtpipe.manifests.write.shard import encode_shard
from dtpipe.pipeline.cli.console import Console, format_bytes, format_seconds

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
    free_bytes: int | None
    device: str
    workers: int
    teacher_s: float
    """Per image, teacher only."""
    prepare_s: float
    """Per image, reading, decoding, resizing, one thread."""
    code_s: float
    """Per image, compression and checksums, one thread."""
    seconds: float
    """The whole extraction: the slowest stage over all workers."""
    memory_bytes: int
    """Peak of one worker: process with teacher and a batch, and the shards in hand."""
    device_bytes: int | None
    """Peak on the GPU; None on the CPU."""
    num_probed: int
    ignored: dict[str, int]
    """What lies in the source and is no sample: extension or why, to count."""


def plan_extraction(config: ExtractConfig) -> ExtractionPlan:
    """The plan of `plan_recipe` alone."""
    return plan_recipe(config)[0]


def plan_recipe(config: ExtractConfig) -> tuple[ExtractionPlan, Recipe]:
    """Resolve the recipe, run the teacher over one batch of real images, and scale up.

    Raises: what `extract` would raise before work: ConfigError, InputError, TeacherError.
    """
    here = config.run.model_copy(update={"inline": True})
    resolved = resolve_recipe(config.model_copy(update={"run": here}))
    work = work_of(resolved)
    return plan_work(work, config.run, bounded(resolved.source.ignored())), work.recipe


def plan_work(work: Work, run: ExtractRun, ignored: Mapping[str, int]) -> ExtractionPlan:
    """What any work would take: its own producer makes one batch of its rows.

    Raises: InputError when none of its first rows can be used, and what the producer raises.
    """
    recipe, listing = work.recipe, work.listing()
    plan = _plan_of(recipe, len(listing))
    producer = work.job_here.open(plan, listing, recipe.compute.device)
    rows, prepare_s = _probe_rows(producer, listing, recipe.compute.batch_size)
    shard, teacher_s, device_bytes = _probe_producer(producer, recipe, rows)
    coded_bytes, code_s = _probe_store(recipe, shard)
    num_samples = len(listing)
    raw = bytes_per_sample(recipe.levels, len(recipe.views), _stored_image(recipe))
    workers = _workers(run, recipe.compute.device)
    slowest_s = max(teacher_s, prepare_s / run.decode_threads, code_s)
    return ExtractionPlan(
        num_samples=num_samples,
        num_shards=plan.num_shards,
        samples_per_shard=recipe.shard.samples,
        views=len(recipe.views),
        levels=_bytes_by_array(recipe),
        raw_bytes=raw * num_samples,
        stored_bytes=coded_bytes * num_samples,
        free_bytes=free_bytes(Store(run.out)),
        device=recipe.compute.device,
        workers=workers,
        teacher_s=teacher_s,
        prepare_s=prepare_s,
        code_s=code_s,
        seconds=slowest_s * num_samples / workers,
        memory_bytes=peak_memory() + SHARDS_IN_HAND * raw * min(recipe.shard.samples, num_samples),
        device_bytes=device_bytes,
        num_probed=len(rows),
        ignored=dict(ignored),
    )


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


def _probe_producer(
    producer: Producer, recipe: Recipe, rows: Sequence[PreparedRow]
) -> tuple[ShardArrays, float, int | None]:
    """A shard of the probe's rows, seconds per row of a full batch after warm-up, codec included, peak bytes on the
    GPU."""
    import torch

    from dtpipe.extract.teachers.arithmetic import exact

    compute = recipe.compute
    if compute.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with exact(torch.device(compute.device), compute.threads):
        producer.produce(rows)
        started = time.perf_counter()
        produced = producer.produce(rows)
        batch = CodedBatch([prepared.index for prepared in rows], produced.images)
        batch.start(produced.levels, level_codecs(recipe))
        batch.wait()
        seconds = (time.perf_counter() - started) / compute.batch_size
    return batch.arrays(recipe), seconds, torch.cuda.max_memory_allocated() if compute.device == "cuda" else None


def _probe_store(recipe: Recipe, shard: ShardArrays) -> tuple[int, float]:
    """Stored bytes per sample and seconds per sample, from a shard that is never written."""
    num = len(shard.rows)
    plan = _plan_of(recipe.model_copy(update={"shard": recipe.shard.model_copy(update={"samples": num})}), num)
    numbered = [index.model_copy(update={"row": row}) for row, index in enumerate(shard.rows)]
    shard, started = replace(shard, rows=numbered), time.perf_counter()
    size = sum(encoded.size_bytes for encoded in encode_shard(plan, 0, shard) if blake3_of(encoded.content))
    return size // num, (time.perf_counter() - started) / num


def _plan_of(recipe: Recipe, num_rows: int) -> Plan:
    """A plan that is never written."""
    num_shards = -(-num_rows // recipe.shard.samples)
    return Plan(
        format=recipe.format, recipe=recipe, num_rows=num_rows, num_shards=num_shards, listing_blake3=blake3_hex(b"")
    )


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
    raw_each = {name: format_bytes(size) for name, size in plan.levels.items()}
    free = "" if plan.free_bytes is None else f"; {format_bytes(plan.free_bytes)} are free there"
    raw = f"{format_bytes(plan.raw_bytes)} before compression, {plan.raw_bytes / max(plan.stored_bytes, 1):.2f}x"
    workers = f"{plan.workers} worker{'s' if plan.workers > 1 else ''} ({plan.device})"
    console.pairs(
        {
            "samples": f"{plan.num_samples} in {count_of(plan.num_shards, 'shard')} of {plan.samples_per_shard}",
            "per sample": f"{', '.join(f'{name} {size}' for name, size in raw_each.items())}; {plan.views} view(s)",
            "bytes": f"about {format_bytes(plan.stored_bytes)} ({raw}){free}",
            "time": f"about {format_seconds(plan.seconds)} on {workers}",
            "per image": f"teacher {_ms(plan.teacher_s)}, decode and resize {_ms(plan.prepare_s)}, "
            f"compress {_ms(plan.code_s)}",
            "memory": f"about {format_bytes(plan.memory_bytes)} per worker"
            + (f", {format_bytes(plan.device_bytes)} on the GPU" if plan.device_bytes is not None else ""),
        }
    )
    if plan.ignored:
        console.result(f"ignored: {ignored_text(plan.ignored)}")
    console.result(f"measured on {plan.num_probed} of the images; nothing was written")
    if plan.free_bytes is not None and plan.stored_bytes > plan.free_bytes:
        console.result("warning: that does not fit; store fewer levels or views, or write to another place")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
