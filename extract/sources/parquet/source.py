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
from typing import TYPE_CHECKING, BinaryIO

from dtpipe.extract.sources.base import Container, SourceItem, SourceKind
from dtpipe.extract.sources.names import key_of, labels_as_text, looks_like_image
from dtpipe.extract.sources.parquet.bounded import (
    check_claims,
    column_chunk,
    column_values,
    image_batches,
    open_parquet,
    read_group_images,
)
from dtpipe.extract.sources.parquet.columns import ParquetColumns, find_columns, image_columns, image_leaf
from dtpipe.extract.sources.parquet.groups import GroupCache
from dtpipe.extract.sources.places import Place, changed, container_files, is_pattern, open_place, unreadable
from dtpipe.extract.sources.web import plain_path
from dtpipe.manifests.errors import BadImage, DtpipeError, InputError
from dtpipe.manifests.words import count_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ENDING = ".parquet"
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
            raise changed(path, f"has {count_of(len(images), 'row')} in row group {group}")
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
        with self._reading(path) as (opened, file):
            columns = find_columns(path, file.schema_arrow)
            check_claims(path, file.metadata, opened.seek(0, 2), columns.image)
            _check_inside(path, file.metadata, columns)
            if columns.unused_labels:
                ignored[f"labels {columns.unused_labels}"] += file.metadata.num_rows
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            paths, labels = column_values(
                open_parquet(opened, file.metadata, columns.texts), (columns.path, columns.label)
            )
        places = [(group, row) for group, num_rows in enumerate(groups) for row in range(num_rows)]
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
        with self._reading(path) as (_, file):
            columns = find_columns(path, file.schema_arrow)
            if group >= file.metadata.num_row_groups:
                raise changed(path, f"has {count_of(file.metadata.num_row_groups, 'row group')}")
            try:
                return read_group_images(file, group, columns.image)
            except DtpipeError:
                raise
            except Exception as err:
                if _is_damage(err):
                    raise BadImage(f"its row group, {group}, cannot be decoded: {err}") from err
                raise

    @contextmanager
    def _reading(self, path: str) -> Iterator[tuple[BinaryIO, pq.ParquetFile]]:
        with self._place.open(path) as opened:
            try:
                file = open_parquet(opened, self._metadata.get(path))
                self._metadata[path] = file.metadata
                yield opened, file
            except DtpipeError:
                raise
            except Exception as err:
                if _is_damage(err):
                    raise InputError(f"{path}: is no whole Parquet file ({err}); fetch or write it again") from err
                raise unreadable(path, err) from err


def _example(place: Place, path: str) -> str | None:
    """The column that holds the images, as far as the first rows of it tell. Raises: InputError."""
    source = ParquetSource(place.url)
    with source._reading(path) as (_, file):
        for column in image_columns(file.schema_arrow) if file.metadata.num_row_groups else ():
            part = next(image_batches(file, 0, image_leaf(file.schema_arrow, column)), ())
            if any(looks_like_image(value.as_py()[:16]) for value in part[:_LOOKED_AT] if value.is_valid):
                return f"column {column}"
    return None


def _check_inside(path: str, metadata: pq.FileMetaData, columns: ParquetColumns) -> None:
    """Raises: InputError when images are not inside."""
    nulls = 0
    for group in range(metadata.num_row_groups):
        statistics = column_chunk(metadata, group, columns.image).statistics
        nulls += statistics.null_count if statistics and statistics.has_null_count else 0
    if nulls and nulls == metadata.num_rows:
        raise InputError(
            f"{path}: column {columns.image} is empty, so the images lie elsewhere; "
            f"write it with the images embedded (`push_to_hub` does)"
        )


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
