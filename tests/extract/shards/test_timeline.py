"""Where a worker's time goes: nothing is left out or counted twice, and what is slow is what is named."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from dtpipe.extract.cluster.inline import run_inline
from dtpipe.extract.shards import advice as advice_module
from dtpipe.extract.shards import timeline
from dtpipe.extract.shards.advice import advice
from dtpipe.extract.shards.progress import ProgressMeter
from dtpipe.extract.shards.queue import ShardQueue
from dtpipe.extract.shards.reader import ImageReader
from dtpipe.extract.shards.timeline import CAUSES, ShardClock, Stalls, Timeline
from dtpipe.extract.shards.worker import ShardWorker
from dtpipe.extract.sources.folder import FolderSource
from dtpipe.manifests.schema import CodecRecipe, Recipe
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.store import Store
from parts import golden
from parts.workers import OpenWorker, Still

SLOW_S = 0.1
ZARR = golden.make_recipe(golden.Settings())


def run(worker: ShardWorker) -> Stalls:
    """All shards, by the loop that feeds a worker in this process; where its time went."""
    queue = ShardQueue(range(worker.plan.num_shards), retries=0)
    meter = ProgressMeter(worker.plan.num_shards, worker.plan.num_rows)
    run_inline(worker, queue, meter, lambda _: None, StopRequest())
    queue.raise_if_failed()
    return worker.stalls()


def test_spans_of_a_shard_add_up_to_its_wall_clock(open_worker: OpenWorker) -> None:
    worker = open_worker(Still)
    started_s = time.perf_counter()
    seconds = worker.extract_shard(0).provenance["seconds"]
    wall_s = time.perf_counter() - started_s
    assert sum(seconds["spans"].values()) == pytest.approx(seconds["shard"], abs=1e-4)
    assert 0.3 * wall_s < seconds["shard"] <= wall_s  # but for what comes before, and the commit
    named = {"turn", "rows", "teacher", "codec", "coding", "room", "bytes", "writer", "measure", "write"}
    assert set(seconds["spans"]) == named
    assert set(seconds["work"]) == {"read", "decode", "noise", "compress", "digest", "store"}
    assert all(value >= 0 for value in (*seconds["spans"].values(), *seconds["work"].values()))


def test_a_producer_is_idle_for_a_writer_or_for_want_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: clock[0])

    def passes(seconds: float) -> None:
        clock[0] += seconds

    worker = Timeline()
    passes(1)  # nothing to do
    shard = ShardClock(worker)
    with worker.producing():
        passes(3)
        shard.lap("rows")
        passes(5)
        shard.lap("teacher", {"codec": 2})
    passes(7)  # nothing to do
    with worker.writing():
        passes(11)  # idle while a shard is written
        with worker.producing():
            later = ShardClock(worker)
            passes(13)
            later.lap("teacher")
        passes(17)  # and again
        assert worker.now().spans["write"] == 11 + 17
        with worker.writing():
            passes(19)
    passes(23)
    stalls = worker.now()
    assert stalls.spans == {"wait": 1 + 7 + 23, "write": 11 + 17 + 19, "rows": 3, "teacher": 3 + 13, "codec": 2}
    assert stalls.seconds == clock[0] - 100
    assert shard.record() == {"shard": 8, "spans": {"rows": 3, "codec": 2, "teacher": 3}, "work": {}}


def test_waiting_for_rows_is_divided_as_the_work_on_them() -> None:
    one = Stalls({"rows": 4.0, "teacher": 5.0, "coding": 1.0}, {"read": 9.0, "decode": 3.0}, 2, 2, 8)
    other = Stalls({"teacher": 6.0, "room": 3.0, "wait": 1.0}, {"noise": 1.0}, 2, 4, 8)
    assert one.shares() == {"read": 0.3, "decode": 0.1, "noise": 0, "teacher": 0.5, "codec": 0.1, "write": 0, "wait": 0}
    assert tuple(one.shares()) == CAUSES
    total = one + other
    assert sum(total.shares().values()) == pytest.approx(1)
    assert total.shares()["teacher"] == pytest.approx(11 / 20)
    assert Stalls.from_record(total.record()) == total
    assert Stalls().shares() == {}


def slow(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """A method takes longer."""
    method: Callable[..., Any] = getattr(owner, name)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW_S)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, slowly)


@pytest.mark.parametrize(
    ("owner", "name", "cause", "sentence"),
    [
        (FolderSource, "read", "read", r"by reading images: raise extract\.run\.decode_threads from 1"),
        (ImageReader, "decode_bytes", "decode", r"by decoding images: (raise extract\.run\.decode_threads|give each)"),
        (Store, "write", "write", "by writing: bring --out to a faster store"),
        (None, "", "teacher", r"the teacher is busy \d+% of the time: only more or faster devices"),
    ],
)
def test_what_is_slow_is_named(
    owner: type | None,
    name: str,
    cause: str,
    sentence: str,
    open_worker: OpenWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(advice_module, "_TELLING_S", 0.0)
    pause_s = 5 * SLOW_S if owner is None else 0.0
    worker = open_worker(lambda teacher: Still(teacher, pause_s), decode_threads=1, limit=4, shard={"samples": 2})
    if owner is not None:
        slow(monkeypatch, owner, name)
    stalls = run(worker)
    shares = stalls.shares()
    assert max(shares, key=lambda part: shares[part]) == cause, stalls.record()
    assert sum(shares.values()) == pytest.approx(1)
    said = advice(stalls, ZARR)
    assert said is not None
    assert re.search(sentence, said), said


def test_advice_knows_what_there_is_to_raise() -> None:
    def said(spans: dict[str, float], work: dict[str, float], recipe: Recipe = ZARR, **machine: int) -> str:
        threads = {"decode_threads": 2, "code_threads": 2}
        text = advice(Stalls({"teacher": 50.0, **spans}, work, **{**threads, **machine}), recipe)
        assert text is not None
        return text

    assert said({"rows": 50}, {"noise": 1}, cpus=8).endswith("decode_threads from 2 to up to 8")
    assert said({"rows": 50}, {"noise": 1}, cpus=2).endswith("drawing noise: give each worker more than 2 CPUs")
    assert said({"coding": 20}, {}, cpus=8).endswith("compression: raise extract.run.code_threads from 2 to up to 8")
    assert said({"coding": 20}, {}, cpus=2).endswith("more than 2 CPUs, or lower extract.shard.zstd_level")
    fitted = ZARR.model_copy(update={"codec": CodecRecipe(symbols_zstd_level=12)})
    assert said({"coding": 20}, {}, fitted, cpus=2).endswith("lower extract.codec.zstd_level, or take the coder rans")
    tars = golden.make_recipe(golden.Settings("webdataset"))
    assert said({"coding": 20}, {}, tars, cpus=2).endswith("compression: give each worker more than 2 CPUs")
    assert "codec on the teacher's device" in said({"codec": 20}, {}, cpus=2)
    assert "by digests" in said({"write": 20}, {"digest": 2, "store": 1}, cpus=2)
    assert "extract.shard.samples" in said({"wait": 20}, {}, cpus=2)
    assert said({"wait": 1}, {}, cpus=2).startswith("the teacher is busy 98%")
    assert advice(Stalls({"teacher": 0.5}), ZARR) is None  # too little to tell
