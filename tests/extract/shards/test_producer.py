"""A worker runs whatever makes levels of rows: here without images or a teacher, inline and on a cluster."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.extract.cluster.inline import run_inline
from dtpipe.extract.encode import Encoded
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.shards.producer import PreparedRow
from dtpipe.extract.shards.progress import ProgressMeter
from dtpipe.extract.shards.queue import ShardQueue
from dtpipe.extract.shards.task import WorkerContext
from dtpipe.extract.shards.worker import ShardWorker
from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import IndexRow, Plan
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import load_entry, merge, pending_shards
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import plan_digest, start_plan
from parts.extractions import MakeConfig

BAD_ROW = 4


@dataclass(frozen=True)
class Numbers:
    """A job and its own producer: every value of a row is the row's number."""

    plan: Plan | None = None

    def open(self, plan: Plan, listing: Listing, device: str) -> Numbers:
        return Numbers(plan)

    def prepare(self, index: IndexRow) -> PreparedRow:
        if index.row == BAD_ROW:
            return PreparedRow(index.model_copy(update={"status": "bad: no good"}), None)
        return PreparedRow(index, index.row)

    def produce(self, rows: Sequence[PreparedRow], batch_size: int) -> Encoded:
        assert self.plan is not None
        levels = {
            level.name: torch.stack(
                [torch.full((1, level.channels, level.height, level.width), float(row.content or 0)) for row in rows]
            )
            for level in self.plan.recipe.levels
        }
        return Encoded(levels, None)

    def measure(self, arrays: ShardArrays, codecs: Mapping[str, LevelCodec], batch_size: int) -> dict[str, Any]:
        return {"rows": len(arrays.rows)}


@pytest.mark.parametrize("on_cluster", [False, True])
def test_a_dataset_of_anything_that_gives_levels(on_cluster: bool, make_config: MakeConfig) -> None:
    config = make_config(shard={"samples": 3, "images": "joined"})
    resolved, store = resolve_recipe(config), Store(config.run.out)
    with Lock.acquire(store) as lock:
        plan, _ = start_plan(store, resolved.recipe, lambda: resolved.listing, {})
        write_zarr_metadata(store, plan)
        context = WorkerContext(config.run.out, Numbers(), "cpu", lock.epoch, max_bad=1)
        queue = ShardQueue(pending_shards(store, plan), retries=0)
        extract = on_an_actor if on_cluster else here
        extract(context, queue)
        queue.raise_if_failed()
        merge(store, plan, lock, {})
        assert load_entry(store, plan, plan_digest(store), 0).provenance["rows"] == 3
    dataset = FeatureDataset.open(config.run.out)
    assert [row for row in range(8) if dataset.columns.status[row] != "ok"] == [BAD_ROW]
    for row in dataset.columns.ok_rows:
        assert np.unique(read_level(dataset, "l2", int(row))).tolist() == [row]


def here(context: WorkerContext, queue: ShardQueue) -> None:
    worker = ShardWorker(context)
    run_inline(worker, queue, ProgressMeter(3, 8), lambda _: None, StopRequest())
    worker.close()


def on_an_actor(context: WorkerContext, queue: ShardQueue) -> None:
    """What an actor does, with what travels to it and back."""
    from dtpipe.extract.cluster.actor import ExtractActor

    actor = ExtractActor(pickle.loads(pickle.dumps(context)))
    actor.prepare()
    while task := queue.take():
        summary = pickle.loads(pickle.dumps(actor.extract(task.shard_idx)))
        assert summary.shard_idx == task.shard_idx
