"""One worker: from a shard's number to its committed objects. The same class runs inside a Ray actor and in-process.

Three stages overlap. Decode threads run a bounded number of batches ahead of the teacher; the teacher takes one shard
at a time; and while a shard is written the next one is encoded, when `extract_shard` is called from two threads. One
shard is in the teacher and one in the writer, so a worker never holds more than two, and never has more than one
whose objects are on the store without a commit.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.encode import encode, stack_rows
from dtpipe.extract.latents import StoredLatents
from dtpipe.extract.precision import float32_error
from dtpipe.extract.shards.buffer import CodedBatch, ShardBuffer
from dtpipe.extract.shards.progress import BadSample
from dtpipe.extract.shards.rows import BatchQueue, PreparedRow, RowReader, StageSeconds
from dtpipe.extract.sources.features import FeaturesSource
from dtpipe.extract.sources.registry import open_images
from dtpipe.extract.teachers.arithmetic import exact
from dtpipe.extract.teachers.base import Teacher
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.errors import ErrorBudgetError, TeacherError
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.schema import FLOAT32_ERROR, MEASURED_SHARD, IndexRow, Recipe, ShardEntry
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import commit_entry, commit_name, load_entry
from dtpipe.manifests.write.listing import read_listing
from dtpipe.manifests.write.lock import check_epoch
from dtpipe.manifests.write.plan import load_plan, plan_digest
from dtpipe.manifests.write.shard import write_shard

NEARLY_DONE = 0.75  # a stop lets a shard finish when this share of it has been through the teacher
NAMED_BAD = 20  # bad samples named per shard in its summary


class ShardDroppedError(Exception):
    """A stop was asked for and this shard was not nearly done; nothing of it was published."""


@dataclass(frozen=True)
class WorkerContext:
    """All that a worker needs besides what the dataset's plan says; small, and travels to Ray workers."""

    out: str
    images: str | None
    source_kind: str
    teacher: TeacherConfig
    device: str
    epoch: int
    max_bad: int  # bad samples that the whole dataset may have
    num_samples: int | None = None  # in place of images
    decode_threads: int = 2
    max_pixels: int = 128_000_000
    fault: str | None = None  # armed fault hook, `name` or `name:n`
    versions: dict[str, str] = field(default_factory=dict)  # the driver's; every node must have the same


@dataclass(frozen=True)
class ShardSummary:
    """What the driver learns about a committed shard."""

    shard_idx: int
    num_rows: int
    num_bad: int
    bad: tuple[BadSample, ...]  # the first few
    size_bytes: int
    seconds: dict[str, float]


def bad_samples(rows: Sequence[IndexRow]) -> list[BadSample]:
    """The bad ones among index rows."""
    return [BadSample(row.key, row.status.removeprefix("bad: ")) for row in rows if row.status != "ok"]


def summarize(entry: ShardEntry) -> ShardSummary:
    """The small part of a shard's entry that the driver needs."""
    bad = bad_samples(entry.rows)
    return ShardSummary(
        shard_idx=entry.shard,
        num_rows=len(entry.rows),
        num_bad=len(bad),
        bad=tuple(bad[:NAMED_BAD]),
        size_bytes=sum(each.size_bytes for each in entry.objects),
        seconds=dict(entry.provenance.get("seconds", {})),
    )


def budget_message(where: str, num_bad: int, max_bad: int, bad: Sequence[BadSample]) -> str:
    """What to say when the error budget for samples is exceeded."""
    named = "; ".join(f"{each.key}: {each.reason}" for each in bad[:5])
    more = f"; and {num_bad - 5} more" if num_bad > 5 else ""
    return (
        f"{where} has {num_bad} bad samples, extract.run.max_bad allows {max_bad} ({named}{more}); "
        f"mend the images, or run again with a larger --max-bad"
    )


def check_weights(teacher: Teacher, recipe: Recipe, path: str) -> None:
    """Raises: TeacherError when these are not the weights of the recipe."""
    found, expected = teacher.spec.weights_blake3, recipe.teacher.weights_blake3
    if found != expected:
        raise TeacherError(
            f"{path} on {os.uname().nodename}: weights digest is {found[:16]}.., the plan says {expected[:16]}..; "
            f"give every node the same checkpoint"
        )


class ShardWorker:
    """A loaded teacher, an open source and an open dataset; `extract_shard` may run in two threads at once."""

    def __init__(self, context: WorkerContext, teacher: Teacher | None = None) -> None:
        self.context = context
        self.store = Store(context.out)
        self.plan = load_plan(self.store)
        self.plan_blake3 = plan_digest(self.store)
        self.recipe: Recipe = self.plan.recipe
        with self._exact():
            self.teacher = teacher if teacher is not None else load_teacher(context.teacher, context.device)
        check_weights(self.teacher, self.recipe, context.teacher.path)
        source = open_images(context.images, context.num_samples, context.source_kind)
        listing = read_listing(self.store, self.plan.listing_blake3)
        latents = (
            StoredLatents.find(source.dataset, self.teacher.spec, self.recipe)
            if isinstance(source, FeaturesSource)
            else None
        )
        self.reader = RowReader(source, listing, self.recipe, self.teacher.spec, context.max_pixels, latents)
        self.num_encoded = 0  # rows through the teacher since start; read by progress
        self._pool = ThreadPoolExecutor(context.decode_threads, thread_name_prefix="decode")
        self._teacher_turn = threading.Lock()
        self._writer_turn = threading.Lock()
        self._stop = threading.Event()

    def _exact(self) -> AbstractContextManager[None]:
        return exact(torch.device(self.context.device), self.recipe.compute.threads)

    def request_stop(self) -> None:
        """Ask running shards to finish if nearly done, else to raise ShardDroppedError."""
        self._stop.set()

    def close(self) -> None:
        """End the decode threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def extract_shard(self, shard_idx: int) -> ShardEntry:
        """Decode, encode, write and commit one shard; returns its entry. One that is committed already is not done again.

        Raises: ErrorBudgetError before anything is written when this shard alone has too many bad samples;
        ShardDroppedError on a stop; LockHeldError when another writer took the dataset over.
        """
        if self.store.exists(commit_name(shard_idx)):  # by an earlier attempt whose answer was lost
            return load_entry(self.store, self.plan, self.plan_blake3, shard_idx)
        seconds, started_s = StageSeconds(), time.perf_counter()
        batches = BatchQueue(self.reader, self._pool, self.plan.shard_rows(shard_idx), seconds)
        try:
            with self._teacher_turn, self._exact():
                arrays = self._encode(shard_idx, batches, seconds)
        finally:
            batches.close()
        self._check_budget(shard_idx, arrays.rows)
        with self._writer_turn:
            return self._publish(shard_idx, arrays, seconds, started_s)

    def _encode(self, shard_idx: int, batches: BatchQueue, seconds: StageSeconds) -> ShardArrays:
        """All rows of a shard through the teacher, coded."""
        num_rows = len(self.plan.shard_rows(shard_idx))
        shard = ShardBuffer(self.recipe, num_rows)
        on_device: CodedBatch | None = None  # one batch behind, so that its copy overlaps with the next forward pass
        while len(shard.rows) < num_rows:
            self._drop_if_stopped(shard_idx, len(shard.rows) / num_rows)
            started_s = time.perf_counter()
            batch = batches.take()
            seconds.add("wait_for_decode", started_s)
            started_s = time.perf_counter()
            coded = None if batch is None else self._encode_batch(batch, shard.codecs)
            if on_device is not None:
                shard.take(on_device)
                self.num_encoded += len(on_device.rows)
            seconds.add("teacher", started_s)
            on_device = coded
        return shard.arrays()

    def _encode_batch(self, batch: Sequence[PreparedRow], codecs: Mapping[str, LevelCodec]) -> CodedBatch:
        """Start one batch on the device; one without a good row has nothing to do there."""
        recipe, index = self.recipe, [row.index for row in batch]
        if not any(row.sample for row in batch):
            return CodedBatch(
                index, np.zeros((len(batch), recipe.transform.height, recipe.transform.width, 3), np.uint8)
            )
        rows = stack_rows([row.sample for row in batch], recipe.views, recipe.levels)
        encoded = encode(self.teacher, rows, self.context.device, recipe.compute)
        assert encoded.images is not None
        coded = CodedBatch(index, encoded.images)
        coded.start(encoded.levels, codecs)
        return coded

    def _drop_if_stopped(self, shard_idx: int, share_done: float) -> None:
        """On a stop, give up a shard that is not nearly done."""
        if self._stop.is_set() and share_done < NEARLY_DONE:
            raise ShardDroppedError(f"shard {shard_idx} was dropped at {share_done:.0%}: a stop was asked for")

    def _check_budget(self, shard_idx: int, rows: Sequence[IndexRow]) -> None:
        """Refuse a shard that is over the whole budget by itself: its cause may be a lost mount, not its images."""
        bad = bad_samples(rows)
        if len(bad) > self.context.max_bad:
            raise ErrorBudgetError(budget_message(f"shard {shard_idx}", len(bad), self.context.max_bad, bad))

    def _measured(self, shard_idx: int, arrays: ShardArrays) -> dict[str, object]:
        """What low precision costs, once per dataset."""
        if shard_idx != MEASURED_SHARD or self.recipe.compute.dtype == "float32":
            return {}
        with self._teacher_turn:
            return {FLOAT32_ERROR: float32_error(self.context.teacher, self.recipe, arrays, self.context.device)}

    def _publish(self, shard_idx: int, arrays: ShardArrays, seconds: StageSeconds, started_s: float) -> ShardEntry:
        """Write the objects, then the entry, if the dataset is still ours."""
        measured = self._measured(shard_idx, arrays)
        check_epoch(self.store, self.context.epoch)
        wrote_s = time.perf_counter()
        entry = write_shard(self.store, self.plan, self.plan_blake3, shard_idx, arrays, self.context.epoch, {})
        seconds.add("write", wrote_s)
        seconds.add("shard", started_s)
        provenance = {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "device": self.context.device,
            "seconds": seconds.values,
            **measured,
        }
        entry = entry.model_copy(update={"provenance": {**entry.provenance, **provenance}})
        commit_entry(self.store, entry, self.context.epoch)
        return entry
