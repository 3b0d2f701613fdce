"""Reading and augmenting labelled images: each training view is a function of (seed, key, pass), of nothing else.

Torch's, numpy's and Python's global generators are seeded for each view, so that worker processes, their number and
what came before change nothing. Workers are forked from a clean server process: this one may hold threads and a GPU.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from blake3 import blake3
from torch.utils.data import DataLoader, Dataset

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.base import Example, TunedTask
from dtpipe.distill.downstream.tuned.config import TuneRun
from dtpipe.distill.engine.ranks import ranks_of_this_machine
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import KIND_WORDS, Instances, Mask, Pixels, Target

_FEW_CPUS, _MOST_WORKERS = 4, 8
_PRELOADED = ("torch", "ray.cloudpickle", __name__)


@dataclass(frozen=True)
class View:
    """One training view: an image's row, the pass over the set that it belongs to, and which of its repeats it is."""

    row: int
    passed: int
    repeat: int = 0


@contextmanager
def seeded_generators(*what: object) -> Iterator[None]:
    """The CPU's global generators begin at a function of `what` inside, and are afterwards as they were before."""
    seed = int.from_bytes(blake3("/".join(map(str, what)).encode()).digest(length=8), "little")
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed >> 1)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


class TrainingViews(Dataset[Example]):
    """The training views of a labelled set. A copy in another process reads for itself."""

    def __init__(self, labelled: LabelledSet, augment: Callable[[Pixels, Target], Example], seed: int) -> None:
        self.labelled, self.augment, self.seed = labelled, augment, seed

    def __getitem__(self, view: View) -> Example:
        image, target = self.labelled.image(view.row), self.labelled.target(view.row)
        with seeded_generators(self.seed, "view", view.passed, view.repeat, self.labelled.keys[view.row]):
            return self.augment(image, target)

    def __getstate__(self) -> bytes:
        from ray import cloudpickle  # sets are made of functions, which pickle cannot take

        pickled: bytes = cloudpickle.dumps((self.labelled, self.augment, self.seed))  # type: ignore[no-untyped-call]
        return pickled

    def __setstate__(self, state: bytes) -> None:
        from ray import cloudpickle

        self.labelled, self.augment, self.seed = cloudpickle.loads(state)


@dataclass(frozen=True)
class _Parts:
    """What a DataLoader takes for batches of indices."""

    views: Callable[[], Iterator[Sequence[View]]]

    def __iter__(self) -> Iterator[list[View]]:
        return map(list, self.views())


def read_ahead(
    views: TrainingViews, parts: Callable[[], Iterator[Sequence[View]]], run: TuneRun
) -> Iterator[list[Example]]:
    """The examples of each part in order, read by as many processes as the settings say."""
    workers = num_workers(run)
    if not workers:
        return ([views[view] for view in part] for part in parts())
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    loader: DataLoader[Any] = DataLoader(
        views,
        batch_sampler=cast(Any, _Parts(parts)),
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=run.prefetch,
        multiprocessing_context=context,
        generator=torch.Generator(),  # of the workers' own seeds: the global one stays as it is
    )
    return iter(loader)


def num_workers(run: TuneRun) -> int:
    """Reading processes of this rank."""
    if run.workers is not None:
        return run.workers
    cpus = len(os.sched_getaffinity(0)) // ranks_of_this_machine()
    return 0 if cpus < _FEW_CPUS else min(cpus - 1, _MOST_WORKERS)


def in_order(labelled: LabelledSet, rows: Sequence[int], ahead: int = 4) -> Iterator[tuple[int, Pixels, Target]]:
    """Whole images and targets of some rows, read by threads ahead of their use."""
    with ThreadPoolExecutor(ahead, thread_name_prefix="read") as pool:
        waiting = [pool.submit(_read, labelled, row) for row in rows[:ahead]]
        for at in range(len(rows)):
            yield waiting.pop(0).result()
            if at + ahead < len(rows):
                waiting.append(pool.submit(_read, labelled, rows[at + ahead]))


def _read(labelled: LabelledSet, row: int) -> tuple[int, Pixels, Target]:
    return row, labelled.image(row), labelled.target(row)


def fit_targets(task: TunedTask[Any], labelled: LabelledSet) -> LabelledSet:
    """The set with the kind of target that a task learns from: objects with masks are masks too.

    Raises: ConfigError for another kind.
    """
    if labelled.kind is task.kind:
        return labelled
    if task.kind is Mask and labelled.kind is Instances:
        return labelled.as_masks()
    raise ConfigError(
        f"task {task.name} learns from {KIND_WORDS[task.kind]}, and these labels are {KIND_WORDS[labelled.kind]}; "
        "`dtpipe list tasks` says what each learns from"
    )
