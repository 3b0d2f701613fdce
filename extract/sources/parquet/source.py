"""Images in Parquet files as Hugging Face datasets stores them: one file, a folder of them, or a pattern.

The image column is a struct with `bytes` (and `path`), or plain binary. A row can only be had by decoding its row
group, so groups are kept for a while: rows in container order decode each group about once, permuted rows nearly one
per image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dtpipe.extract.sources.base import Container, SourceItem, SourceKind
from dtpipe.extract.sources.names import key_of, labels_as_text, looks_like_image
from dtpipe.extract.sources.parquet.columns import ParquetColumns, find_columns, image_columns
from dtpipe.extract.sources.parquet.groups import GroupCache
from dtpipe.extract.sources.places import Place, changed, container_files, is_pattern, open_place, unreadable
from dtpipe.extract.sources.web import plain_path
from dtpipe.manifests.errors import BadImage, DtpipeError, InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ENDING = ".parquet"
MAX_GROUP_BYTES = 2**30  # of one row group's images, decoded
CACHE_BYTES = 2**28
_LOOKED_AT = 16  # rows, where it is only asked whether a file holds images


class ParquetSource:
    """Rows of the image column; the key is the row's `path` when all have one of their own, else `<file>#<row>`."""

    kind = "parquet"

    def __init__(self, url: str) -> None:
        """Raises: InputError when the file system cannot be used."""
        self.url = url
        self._place = open_place(url)
        self._metadata: dict[str, pq.FileMetaData] = {}
        self._groups = GroupCache(self._decode, CACHE_BYTES)

    def list(self) -> Sequence[SourceItem]:
        """All samples, file by file and row by row; the label is that of column `label`, by name where it has names.

        Raises: InputError for no rows, no image column or several, images that are not inside, or a damaged file.
        """
        return self._listed[0]

    def ignored(self) -> Mapping[str, int]:
        """Other files beside the Parquet ones, and labels that are no classes."""
        return dict(self._listed[1])

    def read(self, uri: str) -> bytes:
        """Bytes of one sample.

        Raises: BadImage for a null or in a damaged row group, InputError when its file cannot be read.
        """
        path, _, numbers = uri.rpartition("#")
        group, row = map(int, numbers.split(","))
        images = self._groups.get((path, group))
        if row >= len(images):
            raise changed(path, f"has {len(images)} rows in row group {group}")
        data: bytes | None = images[row].as_py()
        if data is None:
            raise BadImage("unreadable: the row has no bytes")
        return data

    @cached_property
    def _listed(self) -> tuple[Sequence[SourceItem], Counter[str]]:
        """All samples, and what is ignored."""
        ignored: Counter[str] = Counter()
        rows: list[tuple[str, str | None, str, object]] = []  # `<file>#<row>`, path, URI, label
        for name, path in container_files(self._place, _ENDING, ignored):
            rows += self._rows(name, path, ignored)
        if not rows:
            raise InputError(f"{self.url}: no rows; check the path of your images")
        paths = {path for _, path, _, _ in rows if path}
        unique = len(paths) == len(rows)
        labels = labels_as_text([label for _, _, _, label in rows], "of the column of labels", ignored)
        items = [
            SourceItem(path if unique and path else key, uri, label)
            for (key, path, uri, _), label in zip(rows, labels, strict=True)
        ]
        return items, ignored

    def _rows(self, name: str, path: str, ignored: Counter[str]) -> Iterator[tuple[str, str | None, str, object]]:
        with self._reading(path) as file:
            columns = find_columns(path, file.schema_arrow)
            _check_groups(path, file.metadata, columns)
            if columns.unused_labels:
                ignored[f"labels {columns.unused_labels}"] += file.metadata.num_rows
            table = file.read(columns=[column for column in (columns.path, columns.label) if column])
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        places = [(group, row) for group, num_rows in enumerate(groups) for row in range(num_rows)]
        paths = _values(table, columns.path) or [None] * len(places)
        labels = _values(table, columns.label) or [None] * len(places)
        uri = self._place.uri(path)
        for idx, ((group, row), inner, label) in enumerate(zip(places, paths, labels, strict=True)):
            where = f"{path} row {idx}"
            yield (
                f"{name}#{idx}",
                key_of(inner) if inner else None,
                f"{uri}#{group},{row}",
                columns.label_of(label, where),
            )

    def _decode(self, name: tuple[str, int]) -> pa.ChunkedArray:
        """The images of one row group. Raises: BadImage when it is damaged, InputError when the whole file is."""
        uri, group = name
        path = self._place.path_of(uri)
        with self._reading(path) as file:
            columns = find_columns(path, file.schema_arrow)
            if group >= file.metadata.num_row_groups:
                raise changed(path, f"has {file.metadata.num_row_groups} row groups")
            try:
                return _column(file.read_row_group(group, columns=[columns.image], use_threads=False), columns.image)
            except Exception as err:
                if _is_damage(err):
                    raise BadImage(f"its row group, {group}, cannot be decoded: {err}") from err
                raise

    @contextmanager
    def _reading(self, path: str) -> Iterator[pq.ParquetFile]:
        import pyarrow.parquet as pq

        with self._place.open(path) as opened:
            try:
                file = pq.ParquetFile(
                    opened, metadata=self._metadata.get(path), page_checksum_verification=True, pre_buffer=False
                )
                self._metadata[path] = file.metadata
                yield file
            except DtpipeError:
                raise
            except Exception as err:
                if _is_damage(err):
                    raise InputError(f"{path}: is no whole Parquet file ({err}); fetch or write it again") from err
                raise unreadable(path, err) from err


def _example(place: Place, path: str) -> str | None:
    """The column that holds the images, as far as the first rows of it tell. Raises: InputError."""
    source = ParquetSource(place.url)
    with source._reading(path) as file:
        for column in image_columns(file.schema_arrow):
            batch = next(file.iter_batches(_LOOKED_AT, columns=[column], use_threads=False), None)
            for value in batch[column].to_pylist() if batch else ():
                data = value.get("bytes") if isinstance(value, dict) else value
                if data and looks_like_image(data[:16]):
                    return f"column {column}"
    return None


def _check_groups(path: str, metadata: pq.FileMetaData, columns: ParquetColumns) -> None:
    """Raises: InputError when images are not inside, or a row group is too large to keep."""
    nulls = 0
    for group in range(metadata.num_row_groups):
        parts = [metadata.row_group(group).column(idx) for idx in range(metadata.num_columns)]
        part = next(part for part in parts if part.path_in_schema == columns.image)
        nulls += part.statistics.null_count if part.statistics and part.statistics.has_null_count else 0
        if part.total_uncompressed_size > MAX_GROUP_BYTES:
            raise InputError(
                f"{path}: row group {group} holds {part.total_uncompressed_size / 2**30:.1f} GiB of images, and all "
                f"of it must be decoded to read one; write the file with row groups of at most "
                f"{MAX_GROUP_BYTES / 2**30:.0f} GiB (row_group_size=100, say)"
            )
    if nulls and nulls == metadata.num_rows:
        raise InputError(
            f"{path}: column {columns.image} is empty, so the images lie elsewhere; "
            f"write it with the images embedded (`push_to_hub` does)"
        )


def _values(table: pa.Table, column: str | None) -> list[Any] | None:
    return None if column is None else _column(table, column).to_pylist()


def _column(table: pa.Table, column: str) -> pa.ChunkedArray:
    """A column, or a field of a struct column, with nulls where the struct is null."""
    import pyarrow.compute as pc

    if column in table.column_names:
        return table[column]
    name, _, inner = column.rpartition(".")
    return pc.struct_field(table[name], inner)


def _is_damage(err: Exception) -> bool:
    """True when Arrow rejects the bytes, for some with a bare OSError; the file system's own errors have a number."""
    import pyarrow as pa

    return isinstance(err, pa.ArrowException) or (type(err) is OSError and err.errno is None)


def _recognise(url: str) -> ParquetSource | None:
    """A name or pattern that ends in .parquet."""
    named = plain_path(url).lower().endswith(_ENDING)
    return ParquetSource(url) if named and (is_pattern(url) or not open_place(url).is_folder) else None


KIND = SourceKind(
    kind="parquet",
    reads="Images in Parquet files as Hugging Face writes them: a file, a folder or a pattern.",
    open=ParquetSource,
    recognise=_recognise,
    order="container",  # a row is only had by decoding its whole row group
    container=Container(_ENDING, _example),
)
