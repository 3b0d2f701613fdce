"""Batch sizes of the shards that are still to be written.

One rule: a shard that was sent back is made again as it was made before, so that it comes out with the same bits; only
a run that asks for smaller batches makes it in smaller ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dtpipe.manifests.canonical import load_record
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.layout.batches import batch_in
from dtpipe.manifests.schema import BatchRange, Plan, ShardEntry
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import COMMIT_FOLDER, REJECTED, commit_name, load_manifest
from dtpipe.manifests.write.plan import PLAN_FILE, plan_digest

_SENT_BACK = re.compile(rf"{COMMIT_FOLDER}([0-9]+)\.json{REJECTED}(?:\.([0-9]+))?")


@dataclass(frozen=True)
class BatchSizes:
    """Images per forward pass, by shard."""

    lower_to: int | None = None
    """What this run asks for."""
    before: Mapping[int, int] = field(default_factory=dict)
    """What shards had been made with that were sent back, where it was not the recipe's."""

    def of(self, shard_idx: int, planned: int) -> int:
        """Of one shard, in a dataset whose recipe says `planned`."""
        own = self.before.get(shard_idx, planned)
        return own if self.lower_to is None else min(own, self.lower_to)

    def recorded(self, shard_idx: int, planned: int) -> int | None:
        """What the entry of a shard says of it."""
        size = self.of(shard_idx, planned)
        return size if size < planned else None


PLANNED = BatchSizes()
"""Every shard in batches of the size that the recipe says."""


def sizes_before(store: Store, plan: Plan, shards: Iterable[int]) -> dict[int, int]:
    """Batch sizes with which shards had been made before they were sent back, where these are not the recipe's.

    By the entry that was put aside last; where that is gone or damaged, by the manifest.
    """
    put_aside, plan_blake3 = _put_aside(store), plan_digest(store)
    ranges = _merged_ranges(store, plan_blake3)
    sizes = {}
    for shard_idx in shards:
        entry = _entry_before(store, shard_idx, put_aside.get(shard_idx, 0), plan_blake3)
        size = batch_in(ranges, shard_idx) if entry is None else entry.batch_size
        if size is not None and size < plan.recipe.compute.batch_size:
            sizes[shard_idx] = size
    return sizes


def _put_aside(store: Store) -> dict[int, int]:
    """How many entries of which shards were put aside."""
    names = (_SENT_BACK.fullmatch(name) for name in store.list(COMMIT_FOLDER))
    counts: dict[int, int] = {}
    for name in filter(None, names):
        counts[int(name[1])] = max(counts.get(int(name[1]), 0), int(name[2] or 0) + 1)
    return counts


def _entry_before(store: Store, shard_idx: int, count: int, plan_blake3: str) -> ShardEntry | None:
    """The entry of this plan that was put aside last and can be read."""
    for number in reversed(range(count)):
        name = commit_name(shard_idx) + REJECTED + (f".{number}" if number else "")
        try:
            entry = load_record(ShardEntry, store.read(name), store.where(name))
        except DamagedDataError:
            continue
        if (entry.shard, entry.plan_blake3) == (shard_idx, plan_blake3):
            return entry
    return None


def _merged_ranges(store: Store, plan_blake3: str) -> tuple[BatchRange, ...]:
    """What the last merge said, if it was of this plan."""
    try:
        manifest = load_manifest(store)
    except DamagedDataError:
        return ()
    named = manifest.files.get(PLAN_FILE)
    return manifest.batch_sizes if named is not None and named.blake3 == plan_blake3 else ()
