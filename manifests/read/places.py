"""Where every chunk lies: the tables of shards.parquet, checked against the layout that the plan implies.

One rule: names of objects and the order of chunks follow from the plan, so an entry or a table that says otherwise is
wrong, however well it is sealed. All of it is compared by columns; there is no Python object per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtpipe.manifests.errors import ManifestError
from dtpipe.manifests.layout.arrays import KEY, stored_arrays
from dtpipe.manifests.layout.tables import SHARDS_SCHEMA
from dtpipe.manifests.layout.tar import tar_object_name
from dtpipe.manifests.layout.zarr import shard_object_name
from dtpipe.manifests.read.source import Integers
from dtpipe.manifests.schema import MAX_INTEGER, Plan
from dtpipe.manifests.write.shard import SHARD_FORMATS

_REPAIR = "run `dtpipe verify --repair` on the dataset and extract again"
_CHUNKS_AT_ONCE = 1 << 22  # compared together
_FIELDS = ("offset", "size", "crc32c")


@dataclass(frozen=True)
class ChunkColumns:
    """Offset, size and crc32c of all chunks of all arrays. Shapes: each [number of chunks]."""

    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32c: NDArray[np.uint32]


@dataclass(frozen=True)
class StoredObjects:
    """All objects of a dataset, by number."""

    names: pa.Array
    digests: pa.Array
    """blake3"""
    sizes: NDArray[np.int64]
    """Bytes"""


class ChunkTable:
    """Object, offset, size and crc32c of all chunks of one array, of the shards that are written."""

    def __init__(
        self,
        samples: int,
        width: int,
        shards: NDArray[np.int64],
        objects: StoredObjects,
        object_of: NDArray[np.int64],
        first: NDArray[np.int64],
        columns: ChunkColumns,
    ) -> None:
        """`samples` rows a shard, `width` chunks a row. By shard, in order: which of `objects`, that all tables share,
        and where its chunks begin in the columns."""
        self.shards, self.width, self.columns, self.objects = shards, width, columns, objects
        self._samples, self._object_of, self._first = samples, object_of, first

    def object_name(self, shard_idx: int) -> str | None:
        """Object of a shard; None where it is not written."""
        at = self._at(shard_idx)
        return None if at is None else str(self.objects.names[int(self._object_of[at])])

    def chunk_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the columns the chunks of some rows begin, whose shards are written. Shapes: [n] -> [n]."""
        first = self._first[np.searchsorted(self.shards, rows // self._samples)]
        return np.asarray(first + rows % self._samples * self.width, np.int64)

    def places(
        self, rows: NDArray[np.int64], views: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
        """Number of the object, offset, size and crc32c of chunks whose shards are written. Shapes: [n] -> [n]."""
        shard_idx, within = np.divmod(rows, self._samples)
        at = np.searchsorted(self.shards, shard_idx)
        assert (self.shards[at] == shard_idx).all(), "a row that was never written must be refused before"
        chunk = self._first[at] + within * self.width + views
        return self._object_of[at], self.columns.offset[chunk], self.columns.size[chunk], self.columns.crc32c[chunk]

    def _at(self, shard_idx: int) -> int | None:
        at = int(np.searchsorted(self.shards, shard_idx))
        return at if at < len(self.shards) and self.shards[at] == shard_idx else None


@dataclass(frozen=True)
class _Listed:
    """The arrays in objects, one item per array and object, with their chunks."""

    names: Sequence[str]
    """Arrays that the plan has, by code."""
    widths: NDArray[np.int64]
    """Chunks per row, by code."""
    objects: pa.Array
    digests: pa.Array
    sizes: NDArray[np.int64]
    object_of: NDArray[np.int64]
    shard: NDArray[np.int64]
    code: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    columns: ChunkColumns


def chunk_tables(plan: Plan, shards: pa.Table, where: str, expected: Integers) -> dict[str, ChunkTable]:
    """Tables of all arrays from shards.parquet, or from a table like it of the shards that are `expected`.

    Raises: ManifestError naming `where` and the shard whose objects, arrays or chunks are not as the plan has them.
    """
    listed = _listed(plan, shards, where)
    _check_layout(plan, listed, where, expected)
    samples, order = plan.recipe.shard.samples, np.argsort(listed.shard, kind="stable")
    tables, objects = {}, StoredObjects(listed.objects, listed.digests, listed.sizes)
    for code, (name, width) in enumerate(zip(listed.names, listed.widths.tolist(), strict=True)):
        items = order[listed.code[order] == code]
        tables[name] = ChunkTable(
            samples,
            width,
            listed.shard[items],
            objects,
            listed.object_of[items],
            listed.first[items],
            listed.columns,
        )
    return tables


def check_objects(plan: Plan, shards: pa.Table, where: str, expected: Integers) -> None:
    """See that the objects of some shards are as the plan has them. Raises: as `chunk_tables`."""
    _check_layout(plan, _listed(plan, shards, where), where, expected)


def _listed(plan: Plan, shards: pa.Table, where: str) -> _Listed:
    widths = {name: spec.chunks_per_row for name, spec in stored_arrays(plan.recipe).items()}
    if plan.recipe.shard.format == "webdataset":
        widths = {KEY: 1, **widths}
    parts: list[dict[str, NDArray[Any]]] = [_listed_in(pa.RecordBatch.from_pylist([], SHARDS_SCHEMA), widths, where)]
    num_objects = num_chunks = 0
    for batch in shards.to_batches():
        part = _listed_in(batch, widths, where)
        part["first"], part["object_of"] = part["first"] + num_chunks, part["object_of"] + num_objects
        num_objects, num_chunks = num_objects + len(batch), num_chunks + len(part["offset"])
        parts.append(part)
    whole = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    objects, digests = (
        shards[name].combine_chunks() if shards.num_rows else pa.array([], pa.string()) for name in ("name", "blake3")
    )
    columns = ChunkColumns(*(whole.pop(field) for field in _FIELDS))
    return _Listed(tuple(widths), np.array([*widths.values()]), objects, digests, columns=columns, **whole)


def _listed_in(batch: pa.RecordBatch, widths: Mapping[str, int], where: str) -> dict[str, NDArray[Any]]:
    """The fields of `_Listed` of one batch, and its chunks."""
    arrays = batch["arrays"]
    starts, listed = arrays.offsets.to_numpy(), arrays.values
    lists = {field: listed.field(field) for field in _FIELDS}
    bounds = {field: column.offsets.to_numpy() for field, column in lists.items()}
    if any(
        column.null_count for column in (arrays, listed, *lists.values(), *(each.values for each in lists.values()))
    ):
        raise ManifestError(f"{where}: an object has nulls among its chunks; {_REPAIR}")
    if any(not np.array_equal(bounds["offset"], bounds[field]) for field in _FIELDS):
        raise ManifestError(f"{where}: an array has not as many offsets as sizes and checksums; {_REPAIR}")
    object_of = np.repeat(np.arange(len(batch)), np.diff(starts))
    codes = pc.index_in(listed.field("name"), value_set=pa.array([*widths], pa.string()))
    return {
        "sizes": batch["size_bytes"].to_numpy(),
        "object_of": object_of,
        "shard": batch["shard"].to_numpy().astype(np.int64)[object_of],
        "code": pc.fill_null(codes, -1).to_numpy().astype(np.int64),
        "first": bounds["offset"][:-1].astype(np.int64),
        "count": np.diff(bounds["offset"]).astype(np.int64),
        **{field: column.values.to_numpy() for field, column in lists.items()},
    }


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One array of several, without a copy where only one has anything in it."""
    filled = [part for part in parts if len(part)] or [parts[0]]
    return filled[0] if len(filled) == 1 else np.concatenate(filled)


def _check_layout(plan: Plan, listed: _Listed, where: str, expected: Integers) -> None:
    """Each shard lists each array once, in the object of that name, with its chunks one after the other."""

    def refuse(wrong: NDArray[np.bool_], why: Callable[[int, str], str]) -> None:
        if wrong.any():
            item = int(np.flatnonzero(wrong)[0])
            shard_idx, code = int(listed.shard[item]), int(listed.code[item])
            text = why(item, listed.names[code] if code >= 0 else "an unknown one")
            raise ManifestError(f"{where}: shard {shard_idx} {text}; {_REPAIR}")

    known = (listed.code >= 0) & (listed.shard >= 0) & (listed.shard < plan.num_shards)
    refuse(~known, lambda _, name: f"lists array {name}, or is itself one, that the plan does not have")
    counts = _rows_of(plan, listed.shard) * listed.widths[listed.code]
    twice = np.ones(len(counts), np.bool_)
    twice[np.unique(listed.shard * len(listed.names) + listed.code, return_index=True)[1]] = False
    refuse(
        twice | (listed.count != counts),
        lambda item, name: f"does not list {counts[item]} chunks of {name}, once",
    )
    shards, num_arrays = np.unique(listed.shard, return_counts=True)
    if len(absent := np.setdiff1d(expected, shards)):
        raise ManifestError(f"{where} does not list objects of shard {absent[0]}; {_REPAIR}")
    if (lacking := num_arrays != len(listed.names)).any():
        raise ManifestError(
            f"{where}: shard {shards[lacking][0]} lacks one of the arrays {', '.join(sorted(listed.names))}; {_REPAIR}"
        )
    _check_names(plan, listed, where, refuse)
    _check_order(plan, listed, refuse)


def _rows_of(plan: Plan, shards: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each shard. Shapes: [n] -> [n]."""
    samples = plan.recipe.shard.samples
    return np.minimum(samples, plan.num_rows - shards * samples)


_Refuse = Callable[[NDArray[np.bool_], Callable[[int, str], str]], None]


def _check_names(plan: Plan, listed: _Listed, where: str, refuse: _Refuse) -> None:
    names, specs = listed.objects.to_pylist(), stored_arrays(plan.recipe)
    expected = [
        tar_object_name(shard_idx) if KEY in listed.names else shard_object_name(specs[listed.names[code]], shard_idx)
        for shard_idx, code in zip(listed.shard.tolist(), listed.code.tolist(), strict=True)
    ]
    refuse(
        np.array([names[at] != name for at, name in zip(listed.object_of.tolist(), expected, strict=True)], np.bool_),
        lambda item, array: f"has {array} in {names[listed.object_of[item]]!r}, the plan implies {expected[item]!r}",
    )
    if len(np.unique(listed.object_of)) != len(names):
        raise ManifestError(f"{where}: an object holds none of the arrays {', '.join(sorted(listed.names))}; {_REPAIR}")
    if len(set(names)) != len(names):
        raise ManifestError(f"{where}: an object is listed twice; {_REPAIR}")


def _check_order(plan: Plan, listed: _Listed, refuse: _Refuse) -> None:
    """Chunks do not overlap and lie in the order they were written in: by row, in a tar then by array, then by view."""
    if not len(listed.shard):
        return
    offset, size, items = listed.columns.offset, listed.columns.size, np.lexsort((listed.shard, listed.code))
    far = min(int(offset.min()), int(size.min())) < 0 or max(int(offset.max()), int(size.max())) > MAX_INTEGER
    refuse(np.full(len(items), far), lambda _, __: "or another has chunks at places that no object has")
    trailer = SHARD_FORMATS[plan.recipe.shard.format].trailer_bytes
    groups = [[*range(len(listed.names))]] if KEY in listed.names else [[code] for code in range(len(listed.names))]
    by_array = items.reshape(len(listed.names), -1)
    for codes in groups:
        for block in _blocks(plan, listed, by_array[codes]):
            chunks = np.concatenate([_chunks_of(plan, listed, of_array) for of_array in block], axis=2)
            chunks = chunks.reshape(len(chunks), -1)  # shard, chunk
            starts, ends = offset[chunks], offset[chunks] + size[chunks] + trailer
            overlap = (starts[:, 1:] < ends[:, :-1]).any(axis=1) | (
                ends[:, -1] > listed.sizes[listed.object_of[block[0]]]
            )
            wrong = np.zeros(len(items), np.bool_)
            wrong[block[0]] = overlap
            refuse(wrong, lambda _, name: f"has chunks of {name} out of their order, or beyond the end of their object")


def _blocks(plan: Plan, listed: _Listed, items: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Some shards at a time, of equally many rows. Shapes: [arrays, shards] -> [arrays, some]."""
    rows = _rows_of(plan, listed.shard[items[0]])
    for count in np.unique(rows):
        chosen = items[:, rows == count]
        step = max(1, _CHUNKS_AT_ONCE // int(count * listed.widths.sum()))
        for first in range(0, chosen.shape[1], step):
            yield chosen[:, first : first + step]


def _chunks_of(plan: Plan, listed: _Listed, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of an array's chunks in the columns. Shapes: [shards] -> [shards, rows, views]."""
    width, num_rows = int(listed.widths[listed.code[items[0]]]), int(_rows_of(plan, listed.shard[items[:1]])[0])
    return (listed.first[items][:, None] + np.arange(num_rows * width)).reshape(len(items), num_rows, width)
