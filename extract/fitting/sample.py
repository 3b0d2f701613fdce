"""The sample of rows that codecs are fitted to, and its features, by the path that extraction takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dtpipe.extract.device import NOTHING_YET
from dtpipe.extract.fitting.base import FitRequest, OnFitted
from dtpipe.extract.shards.producer import Job, PreparedRow, Producer
from dtpipe.extract.shards.rows import BatchQueue
from dtpipe.extract.shards.timeline import ShardClock
from dtpipe.extract.teachers.arithmetic import exact
from dtpipe.manifests.codecs.transform_fit import fit_bytes, held_bytes
from dtpipe.manifests.errors import InputError, saying_what_to_lower
from dtpipe.manifests.schema import IndexRow, Plan, Recipe
from dtpipe.manifests.write.listing import Listing, permutation
from dtpipe.manifests.write.plan import plan_of

MEASURED = 64  # samples whose stored bytes are measured, for a budget
_MOST_BYTES = 4 * 2**30  # of the features of a sample, as float32
_SHARD_COPIES = 1.75  # of these: symbols, chunks and the objects of a shard, at most


@dataclass(frozen=True)
class FitSample:
    """What a fit sees."""

    rows: tuple[IndexRow, ...]
    levels: dict[str, NDArray[np.float32]]
    """{level: [n, C, h, w]}: of each row one view, in turn."""
    images: NDArray[np.uint8] | None
    """[n, H, W, 3], where they are to be stored."""


def chosen_rows(recipe: Recipe, listing: Listing, request: FitRequest) -> Listing:
    """The rows that are looked at: by seed alone, no more than memory holds, in the order of the listing."""
    chosen = sorted(permutation(len(listing), request.seed)[: _most_samples(recipe, request)])
    rows = listing.rows(chosen)
    return Listing(tuple(row.key for row in rows), tuple(row.uri for row in rows), tuple(row.label for row in rows))


def fit_memory_bytes(recipe: Recipe, request: FitRequest, num_rows: int) -> int:
    """About the most memory that a fit takes beside process and teacher: its sample, what is made of one level, and
    for a budget what is kept of all.
    """
    num = min(num_rows, _most_samples(recipe, request))
    image_bytes = 3 * recipe.transform.height * recipe.transform.width if recipe.images == "stored" else 0
    fitted = [level for level in recipe.levels if level.name in request.codecs]
    sample_bytes = num * (_sample_bytes(recipe) + image_bytes)
    largest_bytes = max(fit_bytes(level, num) for level in fitted)
    if request.budget_bytes is None:
        return sample_bytes + largest_bytes
    stored_bytes = min(num, MEASURED) * (_SHARD_COPIES * _sample_bytes(recipe) + 2 * image_bytes)
    return sample_bytes + sum(held_bytes(level, num) for level in fitted) + max(largest_bytes, round(stored_bytes))


def _most_samples(recipe: Recipe, request: FitRequest) -> int:
    return min(request.num_samples, max(1, _MOST_BYTES // _sample_bytes(recipe)))


def _sample_bytes(recipe: Recipe) -> int:
    """Of one view of all levels, as float32."""
    return sum(4 * level.channels * level.height * level.width for level in recipe.levels)


def sample_plan(recipe: Recipe, num_rows: int) -> Plan:
    """A plan of some rows in one shard, which is never written."""
    shard = recipe.shard.model_copy(update={"samples": num_rows})
    return plan_of(recipe.model_copy(update={"shard": shard}), num_rows)


def read_sample(
    recipe: Recipe, listing: Listing, job: Job, device: str, threads: int, on_fitted: OnFitted
) -> FitSample:
    """The features of all rows of a listing, without bad ones and those whose features are not finite.

    Raises: InputError when none can be used; what the job and its producer raise.
    """
    producer = job.open(sample_plan(recipe, len(listing)), listing, device)
    rows = [IndexRow(row=row, key=key, shard=0, label=listing.labels[row]) for row, key in enumerate(listing.keys)]
    gathered = _Gathered(recipe, len(listing))
    with ThreadPoolExecutor(threads, thread_name_prefix="fit") as pool:
        batches = BatchQueue(producer, recipe.compute.batch_size, pool, rows, ShardClock())
        try:
            size = batches.batch_size
            no_room = saying_what_to_lower("the sample that codecs are fitted to", device, size, NOTHING_YET)
            with exact(torch.device(device), recipe.compute.threads), no_room:
                while (batch := batches.take()) is not None:
                    gathered.take(producer, batch)
                    on_fitted(gathered.num_seen, len(rows), None)
        finally:
            batches.close()
    return gathered.sample()


class _Gathered:
    """What has been read, in arrays with room for all rows, so that nothing is held twice."""

    def __init__(self, recipe: Recipe, num_rows: int) -> None:
        self._recipe = recipe
        self._rows: list[IndexRow] = []
        self._levels = {
            level.name: np.empty((num_rows, level.channels, level.height, level.width), np.float32)
            for level in recipe.levels
        }
        size = (recipe.transform.height, recipe.transform.width, 3)
        self._images = np.zeros((num_rows, *size), np.uint8) if recipe.images == "stored" else None
        self.num_seen = 0
        self._why = ""

    def take(self, producer: Producer, batch: list[PreparedRow]) -> None:
        """Add the good rows of one batch."""
        first, self.num_seen = self.num_seen, self.num_seen + len(batch)
        good = [place for place, row in enumerate(batch) if row.content is not None]
        self._why = next((row.index.status for row in batch if row.content is None), self._why)
        if not good:
            return
        produced = producer.produce(batch, self._recipe.compute.batch_size)
        view = torch.tensor([(first + place) % len(self._recipe.views) for place in good])
        picked = {
            name: level[torch.tensor(good), view.to(level.device)].float() for name, level in produced.levels.items()
        }
        finite = (
            torch.stack([torch.isfinite(level).flatten(1).all(dim=1) for level in picked.values()]).all(dim=0).cpu()
        )
        if not finite.all():
            self._why = "bad: its features are not finite"
        start = len(self._rows)
        self._rows += [batch[place].index for place, fits in zip(good, finite.tolist(), strict=True) if fits]
        for name, level in picked.items():
            self._levels[name][start : len(self._rows)] = level.cpu()[finite].numpy()
        if self._images is not None and produced.images is not None:
            self._images[start : len(self._rows)] = produced.images[torch.tensor(good)].cpu()[finite].numpy()

    def sample(self) -> FitSample:
        """All of it. Raises: InputError when there is nothing."""
        if not self._rows:
            raise InputError(
                f"a codec is to be fitted, and none of the {self.num_seen} samples looked at can be used "
                f"({self._why.removeprefix('bad: ')}); look at the images, or extract with -s extract.codec.name=cast"
            )
        num = len(self._rows)
        levels = {name: level[:num] for name, level in self._levels.items()}
        return FitSample(tuple(self._rows), levels, None if self._images is None else self._images[:num])
