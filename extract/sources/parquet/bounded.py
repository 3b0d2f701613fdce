"""Columns of a Parquet file within stated limits, whatever its pages would unpack to.

A page can say in a few bytes that one value is repeated a million times. So images are decoded a few rows at a time and
counted, and texts are kept as numbers of a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from dtpipe.extract.sources.names import MAX_RATIO, RATIO_FROM_BYTES
from dtpipe.manifests.errors import BadImage, InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_GROUP_BYTES = 2**29  # of one row group's images, decoded; reading it takes up to four times as much
_BATCH_BYTES, _BATCH_ROWS = 2**28, 1024
_BUFFER_BYTES = 2**24  # of a column that are fetched at once


def open_parquet(opened: BinaryIO, metadata: pq.FileMetaData | None, texts: Sequence[str] = ()) -> pq.ParquetFile:
    """An open file as Parquet, with `texts` read as dictionaries. Raises: what Arrow raises."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(
        opened,
        metadata=metadata,
        read_dictionary=list(texts),
        page_checksum_verification=True,
        pre_buffer=False,
        buffer_size=_BUFFER_BYTES,
    )


def check_claims(path: str, metadata: pq.FileMetaData, num_bytes: int, image: str) -> None:
    """Raises: InputError when a file claims more rows than bytes, or its images cannot be decoded within the limits."""
    if metadata.num_rows > num_bytes:
        raise InputError(f"{path}: claims {metadata.num_rows} rows in {num_bytes} bytes; fetch or write it again")
    for group in range(metadata.num_row_groups):
        part = column_chunk(metadata, group, image)
        size, packed = part.total_uncompressed_size, part.total_compressed_size
        if size > RATIO_FROM_BYTES and size > MAX_RATIO * packed:
            raise InputError(
                f"{path}: row group {group} unpacks to {size} bytes of images from {packed}, and images hardly shrink; "
                f"write the file again from the images"
            )
        if size > MAX_GROUP_BYTES:
            raise InputError(
                f"{path}: row group {group} holds {size / 2**30:.1f} GiB of images, and all of it must be decoded to "
                f"read one; write the file with row groups of at most {MAX_GROUP_BYTES / 2**30:g} GiB "
                f"(row_group_size=100, say)"
            )


def column_chunk(metadata: pq.FileMetaData, group: int, column: str) -> pq.ColumnChunkMetaData:
    """What a row group says of a column."""
    parts = (metadata.row_group(group).column(idx) for idx in range(metadata.num_columns))
    return next(part for part in parts if part.path_in_schema == column)


def read_group_images(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    """The images of a row group. Raises: BadImage when they are more than the limit, and what Arrow raises."""
    import pyarrow as pa

    parts, size = [], 0
    for part in image_batches(file, group, column):
        parts.append(part)
        size += part.nbytes
        if size > MAX_GROUP_BYTES:
            raise BadImage(f"its row group, {group}, unpacks to more than the limit of {MAX_GROUP_BYTES} bytes")
    return pa.chunked_array(parts)


def image_batches(file: pq.ParquetFile, group: int, column: str) -> Iterator[pa.Array]:
    """The images of a row group, some rows at a time."""
    claimed = column_chunk(file.metadata, group, column).total_uncompressed_size
    num_rows = min(max(_BATCH_BYTES // max(claimed, 1), 1), _BATCH_ROWS)  # no value is larger than `claimed`
    for batch in file.iter_batches(num_rows, row_groups=[group], columns=[column], use_threads=False):
        yield column_of(batch, column)


def column_of(table: pa.Table | pa.RecordBatch, column: str) -> Any:
    """A column, or a field of a struct column, with nulls where the struct is null."""
    import pyarrow.compute as pc

    if column in table.schema.names:
        return table.column(column)
    name, _, inner = column.rpartition(".")
    return pc.struct_field(table.column(name), inner)


def column_values(file: pq.ParquetFile, columns: Sequence[str | None]) -> list[list[Any]]:
    """Columns as Python objects, nulls for a column that is None; equal texts of a row group are one object."""
    values: list[list[Any]] = [[] for _ in columns]
    for group in range(file.metadata.num_row_groups):
        table = file.read_row_group(group, columns=[column for column in columns if column], use_threads=False)
        for column, so_far in zip(columns, values, strict=True):
            so_far += _values(table, column) if column else [None] * file.metadata.row_group(group).num_rows
    return values


def _values(table: pa.Table, column: str) -> list[Any]:
    import pyarrow as pa

    values: list[Any] = []
    for part in column_of(table, column).chunks:
        if pa.types.is_dictionary(part.type):
            known = part.dictionary.to_pylist()
            values += [None if number is None else known[number] for number in part.indices.to_pylist()]
        else:
            values += part.to_pylist()
    return values
