"""Does what a manifest binds together belong together? Compared by columns, when a dataset is opened and by `verify`.

One rule: a seal shows that a file is as it was written, not that it is the file of this dataset, row or shard. What two
files say of the same thing is compared, and what follows from others is derived again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dtpipe.manifests.errors import DamagedDataError, StoreError
from dtpipe.manifests.layout.digest import dataset_digest
from dtpipe.manifests.layout.tables import INDEX_FILE, LISTING_FILE
from dtpipe.manifests.read.chunks import ChunkReader
from dtpipe.manifests.read.located import ChunkRequest
from dtpipe.manifests.read.source import Columns
from dtpipe.manifests.read.texts import rows_with
from dtpipe.manifests.schema import Manifest, Plan
from dtpipe.manifests.write.commit import MANIFEST_FILE, totals_of

MISSING = "missing"  # status of a row whose shard is not written yet
_DECODED = 4  # kinds of chunks of bad rows that are looked at, of each array: zeros are one kind


@dataclass(frozen=True)
class Contradiction:
    """Two files of a dataset that do not belong together."""

    name: str
    """The one that is wrong, as far as can be told."""
    what: str


def compare_merged(
    plan: Plan, manifest: Manifest, listing: pa.Table, index: pa.Table, shards: pa.Table
) -> Iterator[Contradiction]:
    """Manifest, index.parquet and shards.parquet against the plan, the listing and each other.

    `listing` has the columns key and label, `index` these and status.
    """
    if plan.recipe != manifest.recipe:
        yield Contradiction(MANIFEST_FILE, "has another recipe than the plan")
    if index.num_rows != plan.num_rows:
        yield Contradiction(INDEX_FILE, f"has {index.num_rows} rows, the plan {plan.num_rows}")
        return
    if listing.num_rows != plan.num_rows:
        yield Contradiction(LISTING_FILE, f"has {listing.num_rows} rows, the plan {plan.num_rows}")
        return
    for name in ("key", "label"):
        if not index[name].equals(listing[name]):
            row = _first_difference(index[name], listing[name])
            here, there = index[name][row].as_py(), listing[name][row].as_py()
            yield Contradiction(INDEX_FILE, f"row {row} has {name} {here!r}, the listing says {there!r}")
    totals = totals_of(plan, shards, index["status"])
    for name in type(totals).model_fields:
        said, counted = getattr(manifest.totals, name), getattr(totals, name)
        if said != counted:
            yield Contradiction(MANIFEST_FILE, f"says {name} {said}, the tables give {counted}")
    if dataset_digest(plan.recipe, listing["key"], shards, manifest.batch_sizes) != manifest.digest:
        yield Contradiction(MANIFEST_FILE, "its digest is not that of recipe, keys, objects and batch sizes")


def compare_bad_rows(reader: ChunkReader, columns: Columns) -> Iterator[Contradiction]:
    """Bad rows hold zeros: one that does not has the status of another. Few chunks are read, one of each kind.

    What cannot be read is left to those who read it: this one asks for nothing else.
    """
    rows = np.flatnonzero(~rows_with(columns.status, "ok") & ~rows_with(columns.status, MISSING))
    for name, spec in reader.arrays.items():
        for row, view in _kinds(reader, name, rows):
            try:
                chunk = np.empty((1, *spec.chunk_shape), spec.dtype)
                reader.read([ChunkRequest(name, np.array([row]), np.array([view]), chunk)])
            except (DamagedDataError, StoreError, MemoryError, ValueError):
                continue
            if chunk.any():
                what = f"sample {columns.keys[row]!r} (row {row}) is {columns.status[row]}, but its {name} is not zero"
                yield Contradiction(INDEX_FILE, f"{what}: statuses were exchanged, or are of another dataset")
                return


def _kinds(reader: ChunkReader, name: str, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Row and view of one chunk for each size and checksum that bad rows have, the rarest first."""
    table = reader.tables[name]
    chunks = (table.chunk_of(rows)[:, None] + np.arange(table.width)).ravel()
    kinds = table.columns.size[chunks].astype(np.uint64) << np.uint64(32) | table.columns.crc32c[chunks]
    _, first, counts = np.unique(kinds, return_index=True, return_counts=True)
    rarest = first[np.argsort(counts, kind="stable")][:_DECODED]
    return [(int(rows[at // table.width]), int(at % table.width)) for at in rarest]


def _first_difference(one: pa.ChunkedArray, other: pa.ChunkedArray) -> int:
    """Row of the first value that differs, by halves."""
    first, last = 0, len(one)
    while last - first > 1:
        middle = (first + last) // 2
        if one.slice(first, middle - first).equals(other.slice(first, middle - first)):
            first = middle
        else:
            last = middle
    return first
