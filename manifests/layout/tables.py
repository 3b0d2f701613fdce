"""The three Parquet files of a dataset: their columns, and bytes that depend on the rows alone.

One rule: what stands here is content. Identities, epochs and times stay in the commits, so that a merge after any
number of kills writes the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

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


def decode_table(data: bytes, schema: pa.Schema, where: str) -> pa.Table:
    """A table of exactly these columns.

    Raises: ManifestError naming `where` when the bytes are no such table.
    """
    try:
        # not read_table: it starts Arrow's threads all the same, and a process that ends meanwhile can be aborted
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as err:
        raise ManifestError(
            f"{where} is not readable as Parquet ({err}); run `dtpipe verify --repair` on the dataset"
        ) from err
    if not table.schema.equals(schema):
        columns = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise ManifestError(
            f"{where} has columns [{columns}], which are not those of this format; install the dtpipe that wrote it"
        )
    return table


def shards_table(entries: Iterable[ShardEntry]) -> pa.Table:
    """One row per object, its arrays' chunks in list columns."""
    rows = [
        _object_row(entry.shard, stored)
        for entry in sorted(entries, key=lambda entry: entry.shard)
        for stored in entry.objects
    ]
    return pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)


def encode_shards(entries: Iterable[ShardEntry]) -> bytes:
    """shards.parquet: `shards_table` as bytes."""
    return encode_table(shards_table(entries))


def index_table(entries: Iterable[ShardEntry]) -> pa.Table:
    """One row per sample."""
    rows = [row for entry in sorted(entries, key=lambda entry: entry.shard) for row in entry.rows]
    return pa.table({name: [getattr(row, name) for row in rows] for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def encode_index(entries: Iterable[ShardEntry]) -> bytes:
    """index.parquet: `index_table` as bytes."""
    return encode_table(index_table(entries))


def decode_index(data: bytes, where: str) -> pa.Table:
    """index.parquet, with rows 0, 1, 2, ...

    Raises: ManifestError naming `where` when it cannot be read or its rows are not in order.
    """
    table = decode_table(data, INDEX_SCHEMA, where)
    if table["row"].to_pylist() != list(range(table.num_rows)):
        raise ManifestError(
            f"{where}: rows are not 0 to {table.num_rows - 1} in order; run `dtpipe verify --repair` on the dataset"
        )
    return table


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
