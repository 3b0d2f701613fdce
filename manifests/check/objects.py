"""Checking the objects of a dataset: that they are there, hold the bytes of their entries, and decode.

One rule: only objects whose entries are sound are looked at, so no name leads out of the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtpipe.manifests.check.problems import UNREADABLE, Problem, problem_of
from dtpipe.manifests.codecs.base import LevelCodec, array_name, decode_level, parts_of
from dtpipe.manifests.codecs.fitted import StoredFitted, fitted_names
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.layout.arrays import KEY
from dtpipe.manifests.layout.tar import encode_key
from dtpipe.manifests.phases import counted
from dtpipe.manifests.read.chunks import ChunkReader
from dtpipe.manifests.read.located import ChunkRequest
from dtpipe.manifests.read.places import chunk_tables
from dtpipe.manifests.schema import IndexRow, Plan
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import object_blake3, object_stat

_THREADS = 8
Objects = Iterator[tuple[int, str, int, str]]
"""Shard, name, size in bytes and blake3."""


def _objects(shards: pa.Table) -> Objects:
    columns = (shards[name].to_pylist() for name in ("shard", "name", "size_bytes", "blake3"))
    return zip(*columns, strict=True)


def check_sizes(store: Store, shards: pa.Table, problems: list[Problem]) -> None:
    """Every object is there and has its size."""
    stats = store.stats("data")
    for shard_idx, name, size_bytes, _ in _objects(shards):
        try:
            stat = object_stat(store, stats, name)
        except UNREADABLE as err:
            problems.append(problem_of(name, err, "extract", shard_idx))
            continue
        if stat is None:
            problems.append(Problem(name, "is missing", "extract", shard_idx))
        elif stat.size != size_bytes:
            what = f"has {stat.size} bytes, its entry says {size_bytes}"
            problems.append(Problem(name, what, "extract", shard_idx))


def check_digests(store: Store, shards: pa.Table, problems: list[Problem]) -> None:
    """Every object's blake3 is that of its entry; those with a known problem are left out."""
    known = {problem.name for problem in problems}

    def check(stored: tuple[int, str, int, str]) -> Problem | None:
        shard_idx, name, size_bytes, digest = stored
        try:
            intact = object_blake3(store, name, size_bytes) == digest
        except UNREADABLE as err:
            return problem_of(name, err, "extract", shard_idx)
        what = "its bytes are not those of its entry (blake3 differs): damaged, stale or swapped"
        return None if intact else Problem(name, what, "extract", shard_idx)

    with ThreadPoolExecutor(_THREADS) as pool:
        objects = [stored for stored in _objects(shards) if stored[1] not in known]
        checked = counted(pool.map(check, objects), len(objects), "digests of objects")
        problems += [problem for problem in checked if problem is not None]


def check_chunks(store: Store, plan: Plan, shards: pa.Table, index: pa.Table, problems: list[Problem]) -> int:
    """Every chunk of every row can be read, levels decode to finite values, bad rows are zeros. Returns the number of
    chunks."""
    damaged = pa.array({problem.shard for problem in problems if problem.shard is not None}, pa.int32())
    shards, rows = (table.filter(pc.invert(pc.is_in(table["shard"], damaged))) for table in (shards, index))
    tables = chunk_tables(plan, shards, store.url, pc.unique(shards["shard"]).to_numpy())
    reader = ChunkReader(store, plan, tables, dict(zip(rows["row"].to_pylist(), rows["key"].to_pylist(), strict=True)))
    codecs = _usable_codecs(store, plan, problems)
    listed = (IndexRow(**fields) for batch in rows.to_batches(max_chunksize=4096) for fields in batch.to_pylist())
    for row in counted(listed, rows.num_rows, "decoding samples"):
        for problem in _row_problems(reader, codecs, row):
            name = reader.tables[problem.name].object_name(row.shard) or problem.name
            problems.append(replace(problem, name=name, shard=row.shard))
    return int(rows.num_rows) * sum(spec.chunks_per_row for spec in reader.arrays.values())


def _usable_codecs(store: Store, plan: Plan, problems: Sequence[Problem]) -> dict[str, LevelCodec]:
    """Of the levels whose fit is whole: of others nothing can be said but that."""
    lost = {problem.name for problem in problems}
    codecs = level_codecs(plan.recipe, StoredFitted(store))
    return {name: codec for name, codec in codecs.items() if lost.isdisjoint(fitted_names(codec.level))}


def _row_problems(reader: ChunkReader, codecs: Mapping[str, LevelCodec], row: IndexRow) -> Iterator[Problem]:
    """What is wrong in one row, by array."""
    place = f"sample {row.key!r} (row {row.row})"
    values: dict[str, NDArray[np.generic]] = {}
    for name, spec in reader.arrays.items():
        if spec.tables is not None and spec.level not in codecs:
            continue  # its tables are lost, which is said already
        try:
            chunks = np.empty((spec.chunks_per_row, *spec.chunk_shape), spec.dtype)
            views = np.arange(spec.chunks_per_row)
            reader.read([ChunkRequest(name, np.full(len(views), row.row), views, chunks)])
        except UNREADABLE as err:
            yield problem_of(name, err, "extract")
            continue
        except (MemoryError, ValueError):
            what = f"{name} of {place} has chunks of {list(spec.chunk_shape)}, more than this machine can hold"
            yield Problem(name, what, "nobody")
            continue
        values[name] = chunks
        if row.status != "ok" and chunks.any():
            yield Problem(name, f"{name} of {place} is not zero, although the sample is {row.status}", "extract")
    for name, codec in codecs.items():
        whole = all(array_name(name, part) in values for part in codec.parts)
        if whole and row.status == "ok" and not np.isfinite(decode_level(codec, parts_of(codec, values))).all():
            yield Problem(name, f"{name} of {place} is not finite", "extract")
    if KEY in reader.tables:
        try:
            if reader.read_bytes(KEY, row.row) != encode_key(row):
                yield Problem(KEY, f"key.json of {place} says otherwise than the index", "extract")
        except UNREADABLE as err:
            yield problem_of(KEY, err, "extract")
