"""One worker: what it commits, what overlaps, what it keeps in memory and what it refuses."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.extract.shards import worker as worker_module
from dtpipe.extract.shards.buffer import CodedBatch, ShardBuffer
from dtpipe.extract.shards.codecs import ENCODERS, encode_on_device
from dtpipe.extract.shards.reader import ImageReader
from dtpipe.extract.shards.rows import BATCHES_AHEAD, BatchQueue
from dtpipe.extract.shards.task import ShardDroppedError
from dtpipe.extract.shards.teacher import TeacherProducer
from dtpipe.extract.shards.timeline import ShardClock
from dtpipe.extract.shards.worker import ShardWorker, shows_loss
from dtpipe.manifests.codecs.base import SYMBOLS, encode_level
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.errors import BadImage, ErrorBudgetError, InputError, LockHeldError, ShapeError, TeacherError
from dtpipe.manifests.layout.arrays import CodedRows
from dtpipe.manifests.schema import LevelSpec, Plan
from dtpipe.manifests.store.patience import Patience
from dtpipe.manifests.write.commit import pending_shards
from dtpipe.manifests.write.plan import bytes_per_sample
from parts import golden
from parts.workers import OpenWorker, Wrapped


def test_shard_is_committed_once_and_not_done_again(open_worker: OpenWorker) -> None:
    worker = open_worker()
    entry = worker.extract_shard(1)
    assert [row.row for row in entry.rows] == [3, 4, 5]
    assert {row.status for row in entry.rows} == {"ok"}
    assert pending_shards(worker.store, worker.plan) == [0, 2]
    encoded = worker.num_encoded
    assert worker.extract_shard(1) == entry
    assert worker.num_encoded == encoded == 3


@pytest.mark.parametrize(
    ("num_rows", "samples", "batch", "measured"),
    [
        (8, 3, 1, [0, 3, 6]),
        (200, 4096, 32, [0, 64, 128, 192]),
        (2048, 512, 64, [*range(0, 2048, 64)]),
        (4096, 2048, 32, [*range(0, 4096, 256)]),
        (4096, 32, 8, [*range(0, 4096, 256)]),  # as of an ADM of 256 px: of eight shards one
        (4096, 4096, 1024, [0, 1024, 2048, 3072]),
        (8192, 4096, 16, [*range(0, 8192, 512)]),
        (2600, 1300, 1, [*range(0, 2600, 256)]),
    ],
)
def test_few_rows_show_what_codecs_lose(num_rows: int, samples: int, batch: int, measured: list[int]) -> None:
    recipe = golden.make_recipe(golden.Settings())
    recipe = recipe.model_copy(update={"shard": recipe.shard.model_copy(update={"samples": samples})})
    num_shards = -(-num_rows // samples)
    plan = Plan(format=recipe.format, recipe=recipe, num_rows=num_rows, num_shards=num_shards, listing_blake3="0" * 64)
    shown = []
    for shard_idx in range(num_shards):
        rows = plan.shard_rows(shard_idx)
        starts = range(0, len(rows), batch)
        sizes = [min(batch, len(rows) - start) for start in starts]
        shown += [
            rows[start] for start, num in zip(starts, sizes, strict=True) if shows_loss(plan, shard_idx, start, num)
        ]
    assert shown == measured


def two_at_a_time(worker: ShardWorker) -> None:
    """Four shards, as whoever feeds a worker does it."""
    threads = [
        threading.Thread(target=lambda idx=idx: [worker.extract_shard(idx), worker.extract_shard(idx + 1)])
        for idx in (0, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not pending_shards(worker.store, worker.plan)


def test_a_shard_is_encoded_while_another_is_written_and_no_third_is_in_memory(
    open_worker: OpenWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []  # the rows of each shard there was
    most, overlapped, write = [0], [], worker_module.write_rows

    class Counted(ShardBuffer):
        def _encode(self, batch: CodedBatch, start: int) -> CodedRows:
            coded = super()._encode(batch, start)
            gc.collect()
            held.append(weakref.ref(coded))
            most[0] = max(most[0], len({alive.rows[0].shard for each in held if (alive := each()) is not None}))
            if most[0] == 2:
                encoded_next.set()
            return coded

    encoded_next = threading.Event()

    def slow_write(*args: Any) -> Any:
        overlapped.append(encoded_next.wait(20))
        return write(*args)

    monkeypatch.setattr(worker_module, "ShardBuffer", Counted)
    monkeypatch.setattr(worker_module, "write_rows", slow_write)
    worker = open_worker(shard={"samples": 2})
    gc.freeze()  # what is there already need not be looked through at each collection
    try:
        two_at_a_time(worker)
    finally:
        gc.unfreeze()
    assert overlapped == [True] * 4
    assert most[0] == 2


def test_what_is_held_is_bounded_by_bytes(open_worker: OpenWorker) -> None:
    worker = open_worker(shard={"samples": 2})
    one_batch = 2 * bytes_per_sample(worker.plan.recipe.levels, 1, (32, 32))
    two_at_a_time(worker)
    roomy = worker.room.most_bytes
    assert one_batch * 0.5 < roomy <= 2.1 * one_batch  # so small chunks of noise grow by zstd
    worker = open_worker(out=f"{worker.context.out}-tight", shard={"samples": 2}, memory_gb=one_batch / 1e9)
    two_at_a_time(worker)  # each alone, though there are two: none waits for ever
    assert worker.room.most_bytes <= 1.1 * one_batch
    worker = open_worker(out=f"{worker.context.out}er", shard={"samples": 8}, memory_gb=1e-9)
    assert len(worker.extract_shard(0).rows) == 8  # a shard that is too large alone goes on
    assert worker.room.most_bytes > 1.1 * one_batch


def test_decoding_runs_a_bounded_number_of_batches_ahead(open_worker: OpenWorker, many_images: Path) -> None:
    worker = open_worker(images=str(many_images), shard={"samples": 60}, batch_size=4)
    queue = BatchQueue(worker.producer, 4, worker._pool, worker.index_rows(0), ShardClock())
    assert sum(len(batch) for batch in queue._waiting) == 4 * BATCHES_AHEAD
    rows = []
    while (batch := queue.take()) is not None:
        rows += [row.index.row for row in batch]
        assert sum(len(waiting) for waiting in queue._waiting) <= 4 * BATCHES_AHEAD
    assert rows == list(range(60))


def test_worker_of_a_deposed_writer_publishes_nothing(open_worker: OpenWorker) -> None:
    worker = open_worker()
    store = worker.store
    store.write(f"lock/{worker.context.epoch + 1:05d}.json", b"a successor's claim")
    before = store.list("data")
    with pytest.raises(LockHeldError, match="taken over"):
        worker.extract_shard(0)
    assert store.list("data") == before
    assert not store.list("commits/")
    store.delete(f"lock/{worker.context.epoch + 1:05d}.json")


def test_stop_drops_a_shard_that_has_just_begun(open_worker: OpenWorker) -> None:
    worker = open_worker(shard={"samples": 8})
    worker.request_stop()
    with pytest.raises(ShardDroppedError, match="shard 0 was dropped at 0%"):
        worker.extract_shard(0)
    assert not worker.store.list("commits/")


def test_stop_lets_a_nearly_finished_shard_finish(open_worker: OpenWorker) -> None:
    def stop_late(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 4:  # the last of four batches is in the teacher
            worker.request_stop()
        return features

    calls: list[int] = []
    worker = open_worker(lambda teacher: Wrapped(teacher, stop_late), shard={"samples": 8})
    assert len(worker.extract_shard(0).rows) == 8


def test_features_that_do_not_fit_make_a_bad_sample_of_zeros(open_worker: OpenWorker) -> None:
    def overflow(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features["l3"][1] *= 1e9  # finite in float32
        return features

    worker = open_worker(lambda teacher: Wrapped(teacher, overflow), shard={"samples": 2}, max_bad=1)
    rows = worker.extract_shard(0).rows
    assert [row.status for row in rows] == ["ok", "bad: features of l3 are not finite in float16"]


def test_teacher_of_other_shapes_is_refused(open_worker: OpenWorker) -> None:
    worker = open_worker(
        lambda teacher: Wrapped(teacher, lambda features: {name: level[..., :2] for name, level in features.items()})
    )
    with pytest.raises(ShapeError, match="came out of the teacher as"):
        worker.extract_shard(0)


def test_teacher_of_other_weights_is_refused(open_worker: OpenWorker) -> None:
    def other(teacher: Any) -> Any:
        wrapped = Wrapped(teacher, lambda features: features)
        wrapped.spec = type(teacher.spec)(**{**vars(teacher.spec), "weights_blake3": "0" * 64})
        return wrapped

    with pytest.raises(TeacherError, match="weights digest is 0000"):
        open_worker(other)


def test_shard_over_the_whole_budget_is_not_published(open_worker: OpenWorker, image_folder: Path) -> None:
    for path in sorted(image_folder.rglob("*.png"))[:3]:
        path.write_bytes(b"no image")
    worker = open_worker(shard={"samples": 8}, max_bad=2)
    with pytest.raises(ErrorBudgetError, match=r"shard 0 has 3 bad samples, extract\.run\.max_bad allows 2 \(cat/00"):
        worker.extract_shard(0)
    assert not worker.store.list("commits/")


def reader_of(worker: ShardWorker) -> ImageReader:
    assert isinstance(worker.producer, TeacherProducer)
    return worker.producer.reader


class FlakySource:
    """Fails the first reads of each sample as a store out of reach does."""

    def __init__(self, source: Any, failures: int) -> None:
        self._source, self._failures, self._tries = source, failures, dict[str, int]()

    def read(self, uri: str) -> bytes:
        self._tries[uri] = self._tries.get(uri, 0) + 1
        if self._tries[uri] <= self._failures:
            raise InputError("the store does not answer")
        data: bytes = self._source.read(uri)
        return data


def test_reading_is_tried_again_before_the_shard_fails(
    open_worker: OpenWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = Patience(silence_s=0.0, total_s=0.2, first_s=0.2, first_pause_s=0.001)
    monkeypatch.setattr("dtpipe.extract.shards.reader.READ_PATIENCE", patience)
    worker = open_worker()
    reader = reader_of(worker)
    source = reader.source
    object.__setattr__(reader, "source", FlakySource(source, failures=2))
    assert {row.status for row in worker.extract_shard(0).rows} == {"ok"}
    object.__setattr__(reader, "source", FlakySource(source, failures=99))
    with pytest.raises(InputError, match=r"the store does not answer; \d+ attempts failed since"):
        worker.extract_shard(1)
    assert pending_shards(worker.store, worker.plan) == [1, 2]


def test_unreadable_sample_is_bad_and_named(open_worker: OpenWorker) -> None:
    class Gone:
        def read(self, uri: str) -> bytes:
            raise BadImage("unreadable: No such file or directory")

    worker = open_worker(max_bad=8)
    object.__setattr__(reader_of(worker), "source", Gone())
    assert {row.status for row in worker.extract_shard(0).rows} == {"bad: unreadable: No such file or directory"}


def test_rounding_on_the_device_equals_the_reference_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.Generator(np.random.Philox(3)).standard_normal((4, 2, 3, 4, 4), dtype=np.float32) * 100
    level = LevelSpec(name="l2", stride=4, channels=3, height=4, width=4, tap="x")
    codec = open_codec(level)
    parts, finite = encode_on_device(codec, torch.from_numpy(values))
    assert finite.all()
    np.testing.assert_array_equal(parts[SYMBOLS].numpy(), encode_level(codec, values)[SYMBOLS])
    values[2, 0, 0, 0, 0] = 70000.0  # beyond float16
    values[3, 0, 0, 0, 0] = np.nan
    assert encode_on_device(codec, torch.from_numpy(values))[1].tolist() == [True, True, False, False]
    monkeypatch.setitem(ENCODERS, "cast", lambda codec, features: {SYMBOLS: features.to(torch.int8)})
    assert encode_on_device(codec, torch.from_numpy(values))[1].tolist() == [
        True,
        True,
        True,
        False,
    ]  # seen in integers
