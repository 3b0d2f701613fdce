"""Writing one shard: rows become bytes, the bytes become objects, each digested as it goes out; the entry is returned,
for the caller to commit.

One rule: nothing here is seen by a reader until the entry is committed, so a killed writer leaves nothing to clean up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import FittedArrays
from dtpipe.manifests.codecs.fitted import NOT_FITTED
from dtpipe.manifests.layout.arrays import ArraySpec, CodedRows, EncodedObject, ShardArrays
from dtpipe.manifests.layout.tar import decode_tar_chunk, empty_tar_bytes, encode_tar_rows, join_tar_rows
from dtpipe.manifests.layout.zarr import (
    TRAILER_BYTES,
    decode_zarr_chunk,
    empty_zarr_bytes,
    encode_zarr_rows,
    join_zarr_rows,
)
from dtpipe.manifests.pieces import Pieces, blake3_of
from dtpipe.manifests.schema import ObjectEntry, Plan, Recipe, ShardEntry
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.store import Store

Timed = Callable[[str], AbstractContextManager[Any]]
"""Charges a block to a stage, by name."""


@dataclass(frozen=True)
class ShardFormatKind:
    """One way to lay out shards: how rows become bytes, a shard objects, and one chunk an array again."""

    encode: Callable[[Recipe, ShardArrays, FittedArrays], CodedRows]
    join: Callable[[Plan, int, Sequence[CodedRows]], Iterator[EncodedObject]]
    decode: Callable[[ArraySpec, bytes, bytes, NDArray[np.generic]], None]
    """(array, chunk, trailer, out): fills `out`, or raises DamagedDataError."""
    trailer_bytes: int
    """Bytes behind each chunk that belong to it but not to its checksum."""
    empty_bytes: Callable[[Recipe], int]
    """Bytes of a shard beside its rows."""


SHARD_FORMATS: Mapping[str, ShardFormatKind] = {
    "zarr": ShardFormatKind(encode_zarr_rows, join_zarr_rows, decode_zarr_chunk, TRAILER_BYTES, empty_zarr_bytes),
    "webdataset": ShardFormatKind(encode_tar_rows, join_tar_rows, decode_tar_chunk, 0, empty_tar_bytes),
}


def encode_rows(recipe: Recipe, arrays: ShardArrays, fitted: FittedArrays = NOT_FITTED) -> CodedRows:
    """Some rows as bytes; any thread may do it. `fitted` has what levels were fitted with, where a coder needs it.

    Raises: ShapeError when the arrays are not those of the recipe.
    """
    return SHARD_FORMATS[recipe.shard.format].encode(recipe, arrays, fitted)


def join_rows(plan: Plan, shard_idx: int, parts: Sequence[CodedRows]) -> Iterator[EncodedObject]:
    """The objects of one shard, one at a time, from its rows in order; copies none of their bytes.

    Raises: ShapeError when they are not all rows of the shard.
    """
    return SHARD_FORMATS[plan.recipe.shard.format].join(plan, shard_idx, parts)


def encode_shard(
    plan: Plan, shard_idx: int, arrays: ShardArrays, fitted: FittedArrays = NOT_FITTED
) -> Iterator[EncodedObject]:
    """As `encode_rows` and `join_rows` of a whole shard."""
    return join_rows(plan, shard_idx, [encode_rows(plan.recipe, arrays, fitted)])


def write_rows(
    store: Store,
    plan: Plan,
    plan_blake3: str,
    shard_idx: int,
    parts: Sequence[CodedRows],
    epoch: int,
    provenance: Mapping[str, Any],
    timed: Timed = lambda _stage: nullcontext(),
) -> ShardEntry:
    """Write all objects of a shard and return its entry, which the caller commits.

    Each object goes to the store once, under no other name before, and is digested meanwhile. `timed` is told of the
    stages `digest` (in a thread of its own) and `store`.
    Raises: what `join_rows` raises; StoreError when the store does not take the bytes.
    """

    def digest(pieces: Pieces) -> str:
        with timed("digest"):
            return blake3_of(pieces)

    objects = []
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:
        for encoded in join_rows(plan, shard_idx, parts):
            blake3 = beside.submit(digest, encoded.content)
            with timed("store"):
                written = store.write(encoded.name, encoded.content)
            fault_point("shard.object")
            objects.append(
                ObjectEntry(
                    name=encoded.name,
                    size_bytes=encoded.size_bytes,
                    blake3=blake3.result(),
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
        rows=tuple(row for part in parts for row in part.rows),
        provenance=dict(provenance),
    )
