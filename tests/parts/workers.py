"""A worker on a plan of its own, and teachers around a teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.shards.task import WorkerContext
from dtpipe.extract.shards.teacher import TeacherJob
from dtpipe.extract.shards.worker import ShardWorker
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import start_plan
from parts.extractions import MakeConfig

OpenWorker = Callable[..., ShardWorker]


def workers(make_config: MakeConfig) -> Iterator[OpenWorker]:
    """Opens workers on fresh plans under held locks; keyword arguments replace settings, `wrap` wraps the teacher."""
    opened: list[Any] = []

    def start(wrap: Callable[[Any], Any] = lambda teacher: teacher, **changes: Any) -> ShardWorker:
        config = make_config(**changes)
        resolved, store = resolve_recipe(config), Store(config.run.out)
        lock = Lock.acquire(store)
        plan, _ = start_plan(store, resolved.recipe, lambda: resolved.listing, {})
        write_zarr_metadata(store, plan)
        context = WorkerContext(
            out=config.run.out,
            job=TeacherJob(config.teacher, config.images, resolved.source.kind, loaded=wrap(resolved.teacher)),
            device="cpu",
            epoch=lock.epoch,
            max_bad=config.run.max_bad_samples(plan.num_rows),
            decode_threads=config.run.decode_threads,
            memory_bytes=round(config.run.memory_gb * 1e9),
        )
        worker = ShardWorker(context)
        opened.extend((worker, lock))
        return worker

    yield start
    for each in opened:
        each.close() if isinstance(each, ShardWorker) else each.release()


class Wrapped:
    """A teacher that runs a function on what it encodes."""

    def __init__(self, teacher: Any, then: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self.spec, self._teacher, self._then = teacher.spec, teacher, then

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[Any]) -> dict[str, Tensor]:
        return self._then(self._teacher.encode(images, noise, views))


class Still:
    """A teacher of another's levels that costs nothing, or `pause_s` a batch, and gives ones."""

    def __init__(self, teacher: Any, pause_s: float = 0.0) -> None:
        self.spec, self._pause_s = teacher.spec, pause_s

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[Any]) -> dict[str, Tensor]:
        time.sleep(self._pause_s)
        height, width = images.shape[-2:]
        return {
            tap.name: torch.ones(len(images), len(views), tap.channels, height // tap.stride, width // tap.stride)
            for tap in self.spec.levels
        }
