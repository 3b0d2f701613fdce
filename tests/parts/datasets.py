"""Feature datasets without a teacher: a small recipe, and the one writer that tests follow the commit protocol with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtpipe.manifests.codecs.fitted import StoredFitted
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.schema import (
    ComputeRecipe,
    LevelSpec,
    Manifest,
    Plan,
    Recipe,
    ShardRecipe,
    SourceRecipe,
    TeacherRecipe,
    TransformRecipe,
    ViewSpec,
)
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import commit_entry, merge, pending_shards
from dtpipe.manifests.write.fitted import keep_fitted
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import plan_digest, start_plan
from dtpipe.manifests.write.shard import encode_rows, write_rows

MakeArrays = Callable[[Plan, Listing, int], ShardArrays]


@dataclass(frozen=True)
class Item:
    """A listed sample."""

    key: str
    uri: str = ""
    label: str | None = None


def make_recipe(**changes: object) -> Recipe:
    """Images of 32 px, one level l2, two noise draws, webdataset shards of four; `changes` replace fields."""
    fields: dict[str, Any] = {
        "source": SourceRecipe(kind="folder"),
        "transform": TransformRecipe(height=32, width=32),
        "student_px": (32, 32),
        "teacher": TeacherRecipe(kind="toy", weights_blake3="0" * 64),
        "views": (ViewSpec(draw=0), ViewSpec(draw=1)),
        "levels": (LevelSpec(name="l2", stride=4, channels=2, height=8, width=8, tap="up.3"),),
        "shard": ShardRecipe(samples=4, format="webdataset"),
        "compute": ComputeRecipe(device="cpu", batch_size=2, threads=1),
    }
    return Recipe(**{**fields, **changes})


def write_features(
    url: str | Path,
    recipe: Recipe,
    listing: Listing,
    arrays: MakeArrays,
    limit: int | None = None,
    merged: bool = True,
    provenance: Mapping[str, Any] | None = None,
    fitted: Mapping[str, bytes] | None = None,
) -> Manifest | None:
    """Write what is pending, at most `limit` shards, and merge: what extraction does, without a teacher.

    `fitted`: files that the codecs of the levels need, by digest.
    """
    store, provenance = Store(url), provenance or {}
    with Lock.acquire(store, stale_s=1) as lock:
        keep_fitted(store, fitted or {})
        plan, listing = start_plan(store, recipe, listing, provenance)
        if recipe.shard.format == "zarr":
            write_zarr_metadata(store, plan)
        for shard_idx in pending_shards(store, plan)[:limit]:
            content = arrays(plan, listing, shard_idx)
            parts = [encode_rows(plan.recipe, content, StoredFitted(store))]
            entry = write_rows(store, plan, plan_digest(store), shard_idx, parts, lock.epoch, provenance)
            commit_entry(store, entry, lock.epoch)
        return merge(store, plan, lock, provenance) if merged else None
