"""Writing one shard: objects first, each digested as it goes out; its entry is returned, for the caller to commit.

One rule: nothing here is seen by a reader until the entry is committed, so a killed writer leaves nothing to clean up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.layout.arrays import ArraySpec, EncodedObject, ShardArrays
from dtpipe.manifests.layout.tar import decode_tar_chunk, encode_tar_shard
from dtpipe.manifests.layout.zarr import TRAILER_BYTES, decode_zarr_chunk, encode_zarr_shard
from dtpipe.manifests.schema import ObjectEntry, Plan, ShardEntry
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.store import Store


@dataclass(frozen=True)
class ShardFormatKind:
    """One way to lay out shards: how a shard becomes objects, and how one chunk becomes an array again."""

    encode: Callable[[Plan, int, ShardArrays], Iterator[EncodedObject]]
    decode: Callable[[ArraySpec, bytes, bytes, NDArray[np.generic]], None]
    """(array, chunk, trailer, out): fills `out`, or raises DamagedDataError."""
    trailer_bytes: int
    """Bytes behind each chunk that belong to it but not to its checksum."""


SHARD_FORMATS: Mapping[str, ShardFormatKind] = {
    "zarr": ShardFormatKind(encode_zarr_shard, decode_zarr_chunk, TRAILER_BYTES),
    "webdataset": ShardFormatKind(encode_tar_shard, decode_tar_chunk, 0),
}


def encode_shard(plan: Plan, shard_idx: int, arrays: ShardArrays) -> Iterator[EncodedObject]:
    """The objects of one shard, one at a time.

    Raises: ShapeError when the arrays are not those of the plan.
    """
    return SHARD_FORMATS[plan.recipe.shard.format].encode(plan, shard_idx, arrays)


def write_shard(
    store: Store,
    plan: Plan,
    plan_blake3: str,
    shard_idx: int,
    arrays: ShardArrays,
    epoch: int,
    provenance: Mapping[str, Any],
) -> ShardEntry:
    """Write all objects of a shard and return its entry, which the caller commits.

    Raises: what `encode_shard` raises; StoreError when the store does not take the bytes.
    """
    objects = []
    for encoded in encode_shard(plan, shard_idx, arrays):
        written = store.write(encoded.name, encoded.data)
        fault_point("shard.object")
        objects.append(
            ObjectEntry(
                name=encoded.name,
                size_bytes=len(encoded.data),
                blake3=blake3_hex(encoded.data),
                identity=written.identity,
                arrays=encoded.arrays,
            )
        )
    fault_point("shard.objects")
    return ShardEntry(
        format=plan.format,
        shard=shard_idx,
        plan_blake3=plan_blake3,
        epoch=epoch,
        objects=tuple(objects),
        rows=tuple(arrays.rows),
        provenance=dict(provenance),
    )
