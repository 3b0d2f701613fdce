"""The three Parquet files of a dataset: their columns, and bytes that depend on the rows alone.

One rule: what stands here is content. Identities, epochs and times stay in the commits, so that a merge after any
number of kills writes the same bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dtpipe.manifests.errors import ManifestError
from dtpipe.manifests.schema import ObjectEntry, ShardEntry

LISTING_FILE = "listing.parquet"
SHARDS_FILE = "shards.parquet"
INDEX_FILE = "index.parquet"

LISTING_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.string()),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("original_height", pa.int32()),
        pa.field("original_width", pa.int32()),
    ]
)
_ARRAY = pa.struct(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("offset", pa.list_(pa.int64()), nullable=False),
        pa.field("size", pa.list_(pa.int64()), nullable=False),
        pa.field("crc32c", pa.list_(pa.uint32()), nullable=False),
    ]
)
SHARDS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("blake3", pa.string(), nullable=False),
        pa.field("arrays", pa.list_(_ARRAY), nullable=False),
    ]
)


def encode_table(table: pa.Table) -> bytes:
    """A table as Parquet; equal tables give equal bytes with the same pyarrow."""
    sink = io.BytesIO()
    # one row group size and one chunk, so that bytes do not depend on how the table was put together
    pq.write_table(
        table.combine_chunks(),
        sink,
        compression="zstd",
        compression_level=3,
        version="2.6",
        row_group_size=1 << 17,
        write_statistics=True,
    )
    return sink.getvalue()


def decode_table(data: bytes, schema: pa.Schema, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of exactly these columns, or only `columns` of it.

    Raises: ManifestError naming `where` when the bytes are no such table.
    """
    try:
        # not read_table: it starts Arrow's threads all the same, and a process that ends meanwhile can be aborted
        file = pq.ParquetFile(pa.BufferReader(data))
        stored = file.schema_arrow
        table = file.read(columns=columns, use_threads=False) if stored.equals(schema) else None
        if table is not None:
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as err:
        raise ManifestError(
            f"{where} is not readable as Parquet ({err}); run `dtpipe verify --repair` on the dataset"
        ) from err
    if table is None:
        listed = ", ".join(f"{field.name} {field.type}" for field in stored)
        raise ManifestError(
            f"{where} has columns [{listed}], which are not those of this format; install the dtpipe that wrote it"
        )
    return table


def decode_rows(data: bytes, schema: pa.Schema, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """As `decode_table`, of a table whose column `row` is 0, 1, 2, ...

    Raises: ManifestError naming `where` when it cannot be read or its rows are not in order.
    """
    table = decode_table(data, schema, where, None if columns is None else ["row", *columns])
    first = 0
    for chunk in table["row"].iterchunks():
        if not np.array_equal(chunk.to_numpy(), np.arange(first, first + len(chunk))):
            raise ManifestError(
                f"{where}: rows are not 0 to {table.num_rows - 1} in order; run `dtpipe verify --repair` on the dataset"
            )
        first += len(chunk)
    return table


def shards_table(entries: Iterable[ShardEntry]) -> pa.Table:
    """shards.parquet as a table: one row per object, its arrays' chunks in list columns. Entries in shard order."""
    return _by_batch(entries, SHARDS_SCHEMA, _objects_of)


def index_table(entries: Iterable[ShardEntry]) -> pa.Table:
    """index.parquet as a table: one row per sample. Entries in shard order."""
    return _by_batch(entries, INDEX_SCHEMA, _samples_of)


def in_batches(entries: Iterable[ShardEntry]) -> Iterator[list[ShardEntry]]:
    """So many at a time that no more of them than these need be held."""
    remaining = iter(entries)
    while batch := list(itertools.islice(remaining, _BATCH)):
        yield batch


_BATCH = 256  # entries


def _by_batch(
    entries: Iterable[ShardEntry], schema: pa.Schema, convert: Callable[[list[ShardEntry]], pa.Table]
) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *map(convert, in_batches(entries))])


def _objects_of(entries: list[ShardEntry]) -> pa.Table:
    rows = [_object_row(entry.shard, stored) for entry in entries for stored in entry.objects]
    return pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)


def _samples_of(entries: list[ShardEntry]) -> pa.Table:
    rows = [row for entry in entries for row in entry.rows]
    return pa.table({name: [getattr(row, name) for row in rows] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def _object_row(shard_idx: int, stored: ObjectEntry) -> dict[str, object]:
    arrays = [
        {"name": name, "offset": list(members.offset), "size": list(members.size), "crc32c": list(members.crc32c)}
        for name, members in sorted(stored.arrays.items())
    ]
    return {
        "shard": shard_idx,
        "name": stored.name,
        "size_bytes": stored.size_bytes,
        "blake3": stored.blake3,
        "arrays": arrays,
    }
