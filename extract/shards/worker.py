"""One worker: from a shard's number to its committed objects. The same class runs inside a Ray actor and in-process.

Stages overlap. Threads prepare a bounded number of batches ahead of the producer, which takes one shard at a time;
other threads make bytes of what it gave; and while a shard is written the next one is produced, when `extract_shard` is
called from two threads. One shard is in the producer and one in the writer, so a worker never holds more than two, and
never has more than one whose objects are on the store without a commit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dtpipe.extract.device import go_on_with_less
from dtpipe.extract.shards.buffer import CodedBatch, ShardBuffer
from dtpipe.extract.shards.memory import Room
from dtpipe.extract.shards.producer import PreparedRow
from dtpipe.extract.shards.rows import BatchQueue
from dtpipe.extract.shards.task import ShardDroppedError, WorkerContext, bad_samples, budget_message, threads_that_code
from dtpipe.extract.shards.timeline import CODEC, ROWS, TEACHING, ShardClock, Stalls, Timeline
from dtpipe.extract.teachers.arithmetic import exact
from dtpipe.manifests.codecs.fitted import StoredFitted
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import ErrorBudgetError, saying_what_to_lower
from dtpipe.manifests.layout.arrays import CodedRows
from dtpipe.manifests.schema import MEASURED_SHARD, IndexRow, Plan, ShardEntry
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import commit_entry, commit_name, load_entry
from dtpipe.manifests.write.listing import read_listing
from dtpipe.manifests.write.lock import check_epoch
from dtpipe.manifests.write.plan import load_plan, plan_digest
from dtpipe.manifests.write.shard import encode_rows, write_rows

MEASURED_EVERY = 64  # rows of a shard of which one shows what the codecs lose
FEW_ROWS = 2048  # of a dataset; of more, fewer are measured: the reference decodes them, which beside a GPU takes cores
MEASURED_OF_MANY = 256  # rows of the dataset of which one is, then
MEASURED_ROWS = 8  # of a shard, at most
NEARLY_DONE = 0.75  # a stop lets a shard finish when this share of it has been produced


def shows_loss(plan: Plan, shard_idx: int, start: int, num: int) -> bool:
    """True for a batch of `num` rows, from row `start` of its shard on, one of which shows what codecs lose.

    It is the first of each of the even stretches of the shard; in a large dataset of the dataset, where not each small
    shard has one.
    """
    if plan.num_rows <= FEW_ROWS:
        return start % MEASURED_EVERY < num
    samples = plan.recipe.shard.samples
    return (shard_idx * samples + start) % max(MEASURED_OF_MANY, -(-samples // MEASURED_ROWS)) < num


class ShardWorker:
    """A producer and an open dataset; `extract_shard` may run in two threads at once."""

    def __init__(self, context: WorkerContext) -> None:
        """Raises: DtpipeError saying why this worker can do no work."""
        self.context = context
        self.store = Store(context.out)
        self.plan, self.plan_blake3 = load_plan(self.store), plan_digest(self.store)
        self.listing = read_listing(self.store, self.plan.listing_blake3)
        self.fitted = StoredFitted(self.store)
        self.codecs = level_codecs(self.plan.recipe, self.fitted)
        self.producer = context.job.open(self.plan, self.listing, context.device)
        self.num_encoded = 0  # rows produced since start; read by progress
        self.room = Room(context.memory_bytes)
        self._num_coders = context.code_threads or threads_that_code(context.device)
        self._pool = ThreadPoolExecutor(context.decode_threads, thread_name_prefix="decode")
        self._coders = ThreadPoolExecutor(self._num_coders, thread_name_prefix="code")
        self._timeline = Timeline()
        self._producer_turn = threading.Lock()
        self._writer_turn = threading.Lock()
        self._stop = threading.Event()

    def stalls(self) -> Stalls:
        """Where the time of this worker went so far."""
        return replace(
            self._timeline.now(),
            decode_threads=self.context.decode_threads,
            code_threads=self._num_coders,
            cpus=os.cpu_count() or 1,
        )

    def request_stop(self) -> None:
        """Ask running shards to finish if nearly done, else to raise ShardDroppedError."""
        self._stop.set()

    def close(self) -> None:
        """End the threads."""
        for pool in (self._pool, self._coders):
            pool.shutdown(wait=False, cancel_futures=True)

    def extract_shard(self, shard_idx: int) -> ShardEntry:
        """Prepare, produce, write and commit one shard; returns its entry. One that is committed already is not done
        again.

        Raises: ErrorBudgetError before anything is written when this shard alone has too many bad samples;
        ShardDroppedError on a stop; LockHeldError when another writer took the dataset over; DeviceMemoryError.
        """
        if self.store.exists(commit_name(shard_idx)):  # by an earlier attempt whose answer was lost
            return load_entry(self.store, self.plan, self.plan_blake3, shard_idx)
        clock, compute = ShardClock(self._timeline), self.plan.recipe.compute
        size = self.context.batch_sizes.of(shard_idx, compute.batch_size)
        batches = BatchQueue(self.producer, size, self._pool, self.index_rows(shard_idx), clock)
        encode = partial(encode_rows, self.plan.recipe, fitted=self.fitted)
        shard = ShardBuffer(self.plan.recipe, shard_idx, encode, self._coders, self._num_coders, self.room, clock)
        no_room = saying_what_to_lower(f"shard {shard_idx}", self.context.device, size, go_on_with_less(size))
        try:
            with self._producer_turn, no_room:
                clock.lap("turn")
                with self._timeline.producing(), exact(torch.device(self.context.device), compute.threads):
                    self._produce(shard, shard_idx, batches, clock)
                measured = self._measure(shard, shard_idx, size)
                clock.lap("measure")
            parts = shard.parts()
            clock.lap("bytes")
            self._check_budget(shard_idx, [row for part in parts for row in part.rows])
            with self._writer_turn, self._timeline.writing():
                clock.lap("writer")
                return self._publish(shard_idx, parts, {**measured, **shard.fidelity()}, clock)
        finally:
            batches.close()
            shard.close()

    def index_rows(self, shard_idx: int) -> list[IndexRow]:
        """The rows of a shard as the listing has them."""
        keys, labels = self.listing.keys, self.listing.labels
        rows = self.plan.shard_rows(shard_idx)
        return [IndexRow(row=row, key=keys[row], shard=shard_idx, label=labels[row]) for row in rows]

    def _produce(self, shard: ShardBuffer, shard_idx: int, batches: BatchQueue, clock: ShardClock) -> None:
        """All rows of a shard, on their way to bytes."""
        num_rows = len(self.plan.shard_rows(shard_idx))
        num_started = 0
        on_device: CodedBatch | None = None  # one batch behind, so that its copy overlaps with the next forward pass
        while shard.num_rows < num_rows:
            self._drop_if_stopped(shard_idx, shard.num_rows / num_rows)
            batch = batches.take()
            clock.lap(ROWS)
            is_measured = batch is not None and shows_loss(self.plan, shard_idx, num_started, len(batch))
            coded = None if batch is None else self._start(batch, batches.batch_size, is_measured)
            num_started += 0 if batch is None else len(batch)
            clock.lap(TEACHING, {CODEC: coded.coding_s} if coded else {})
            if on_device is not None:
                shard.take(on_device)
                self.num_encoded += len(on_device.rows)
            on_device = coded

    def _start(self, batch: Sequence[PreparedRow], size: int, is_measured: bool) -> CodedBatch:
        """Start one batch on the device; one without a good row has nothing to do there."""
        index = [row.index for row in batch]
        if all(row.content is None for row in batch):
            return CodedBatch(index)
        produced = self.producer.produce(batch, size)
        coded = CodedBatch(index, produced.images)
        good = next(idx for idx, row in enumerate(batch) if row.content is not None)
        coded.start(produced.levels, self.codecs, good if is_measured else None)
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

    def _measure(self, shard: ShardBuffer, shard_idx: int, size: int) -> dict[str, Any]:
        """What the producer measures on one shard, in that one's turn: while it is written, the next may wait for its
        room, with the producer in hand.
        """
        if shard_idx != MEASURED_SHARD:
            return {}
        shard.parts()
        return self.producer.measure(shard.first_rows(), self.codecs, size)

    def _publish(
        self, shard_idx: int, parts: Sequence[CodedRows], measured: Mapping[str, Any], clock: ShardClock
    ) -> ShardEntry:
        """Write the objects, then the entry, if the dataset is still ours."""
        check_epoch(self.store, self.context.epoch)
        provenance = {"host": os.uname().nodename, "pid": os.getpid(), "device": self.context.device, **measured}
        epoch = self.context.epoch
        entry = write_rows(self.store, self.plan, self.plan_blake3, shard_idx, parts, epoch, {}, clock.working)
        clock.lap("write")
        provenance |= {"seconds": clock.record()}
        lower = self.context.batch_sizes.recorded(shard_idx, self.plan.recipe.compute.batch_size)
        entry = entry.model_copy(
            update={
                "provenance": {**entry.provenance, **provenance},
                **({} if lower is None else {"batch_size": lower}),
            }
        )
        commit_entry(self.store, entry, epoch)
        return entry
