"""The single checks that verification is made of; each returns what it found wrong instead of raising.

One rule: a problem says in `mend` who can put it right, so that repair needs no logic of its own about what is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.canonical import blake3_hex, dump_record, load_record
from dtpipe.manifests.codecs.base import LevelCodec, array_name, decode_level, parts_of
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import DamagedDataError, MissingObjectError
from dtpipe.manifests.layout.arrays import KEY
from dtpipe.manifests.layout.tables import (
    INDEX_FILE,
    INDEX_SCHEMA,
    LISTING_FILE,
    SHARDS_FILE,
    SHARDS_SCHEMA,
    decode_table,
    index_table,
    shards_table,
)
from dtpipe.manifests.layout.tar import encode_key
from dtpipe.manifests.layout.zarr import zarr_metadata
from dtpipe.manifests.read.chunks import ChunkReader, ChunkRequest
from dtpipe.manifests.read.compare import compare_merged
from dtpipe.manifests.read.places import check_objects, chunk_tables
from dtpipe.manifests.schema import IndexRow, Manifest, ObjectEntry, Plan, ShardEntry
from dtpipe.manifests.store.store import LOCK_FOLDER, Store
from dtpipe.manifests.write.commit import (
    MANIFEST_FILE,
    commit_name,
    committed_shards,
    load_entry,
    load_manifest,
    object_blake3,
    object_stat,
)
from dtpipe.manifests.write.listing import read_listing, read_listing_table
from dtpipe.manifests.write.lock import LockRecord
from dtpipe.manifests.write.plan import PLAN_FILE, load_plan

Mend = Literal["extract", "merge", "rewrite", "source", "nobody"]
"""extract: the shard is written again. merge: the next merge writes the file. rewrite: repair writes it from the plan
or the manifest. source: the next extract restores it if the source still lists the same. nobody: restore a copy."""

_THREADS = 8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    name: str
    """Object name inside the dataset."""
    what: str
    mend: Mend
    shard: int | None = None


@dataclass(frozen=True)
class Metadata:
    """What could be read of a dataset's metadata."""

    manifest: Manifest | None
    plan: Plan | None
    plan_bytes: bytes | None
    """The plan's bytes as they should be; differ from those in the store when they were rebuilt from the manifest."""
    entries: dict[int, ShardEntry]


def reason(err: Exception) -> str:
    """An error's text without its advice: the caller knows better what comes next."""
    return str(err).split("; ")[0]


def check_metadata(store: Store, problems: list[Problem]) -> Metadata:
    """Read manifest, plan and entries; what cannot be read becomes a problem."""
    manifest = _check_manifest(store, problems)
    plan, plan_bytes = _check_plan(store, manifest, problems)
    _check_locks(store, problems)
    if plan is None or plan_bytes is None:
        return Metadata(manifest, None, None, {})
    _check_listing(store, plan, problems)
    entries = _check_entries(store, plan, blake3_hex(plan_bytes), manifest, problems)
    _check_zarr_metadata(store, plan, manifest, problems)
    if manifest is not None and manifest.complete:
        _check_tables(store, plan, manifest, entries, problems)
    return Metadata(manifest, plan, plan_bytes, entries)


def rebuilt_plan(manifest: Manifest) -> bytes | None:
    """The bytes of plan.json as the manifest describes it, if they come out as the ones it names."""
    totals, files = manifest.totals, manifest.files
    if PLAN_FILE not in files or LISTING_FILE not in files:
        return None
    plan = Plan(
        format=manifest.format,
        recipe=manifest.recipe,
        num_rows=totals.num_rows,
        num_shards=totals.num_shards,
        listing_blake3=files[LISTING_FILE].blake3,
        provenance=manifest.provenance.get("plan", {}),
    )
    data = dump_record(plan)
    return data if blake3_hex(data) == files[PLAN_FILE].blake3 else None


def _check_manifest(store: Store, problems: list[Problem]) -> Manifest | None:
    try:
        return load_manifest(store)
    except MissingObjectError:
        if store.exists(SHARDS_FILE) or store.exists(INDEX_FILE):
            problems.append(Problem(MANIFEST_FILE, "is missing, although the shards were merged or nearly so", "merge"))
        return None
    except DamagedDataError as err:
        problems.append(Problem(MANIFEST_FILE, reason(err), "merge"))
        return None


def _check_plan(store: Store, manifest: Manifest | None, problems: list[Problem]) -> tuple[Plan | None, bytes | None]:
    try:
        data, plan = store.read(PLAN_FILE), load_plan(store)
        if manifest is None or (PLAN_FILE in manifest.files and manifest.files[PLAN_FILE].blake3 == blake3_hex(data)):
            return plan, data
        what = f"is not the plan that {MANIFEST_FILE} names"
    except DamagedDataError as err:
        what = reason(err)
    data_again = rebuilt_plan(manifest) if manifest else None
    problems.append(Problem(PLAN_FILE, what, "nobody" if data_again is None else "rewrite"))
    if data_again is None:
        return None, None
    return load_record(Plan, data_again, PLAN_FILE), data_again


def _check_listing(store: Store, plan: Plan, problems: list[Problem]) -> None:
    try:
        read_listing(store, plan.listing_blake3)
    except DamagedDataError as err:
        problems.append(Problem(LISTING_FILE, reason(err), "source"))


def _check_locks(store: Store, problems: list[Problem]) -> None:
    for name in store.list(LOCK_FOLDER):
        try:
            load_record(LockRecord, store.read(name), store.where(name))
        except MissingObjectError:
            continue  # a writer that ends removes its lock
        except DamagedDataError as err:
            problems.append(Problem(name, reason(err), "rewrite"))


def _check_entries(
    store: Store, plan: Plan, plan_blake3: str, manifest: Manifest | None, problems: list[Problem]
) -> dict[int, ShardEntry]:
    committed = set(committed_shards(store, plan))
    entries = {}
    for shard_idx in range(plan.num_shards):
        name = commit_name(shard_idx)
        if shard_idx not in committed:
            if manifest is not None and manifest.complete:
                problems.append(Problem(name, "is missing, although the manifest says complete", "extract", shard_idx))
            continue
        try:
            entries[shard_idx] = load_entry(store, plan, plan_blake3, shard_idx)
            check_objects(plan, shards_table([entries[shard_idx]]), store.where(name))
        except DamagedDataError as err:
            entries.pop(shard_idx, None)
            problems.append(Problem(name, reason(err), "extract", shard_idx))
    return entries


def _check_zarr_metadata(store: Store, plan: Plan, manifest: Manifest | None, problems: list[Problem]) -> None:
    if plan.recipe.shard.format != "zarr":
        return
    for name, data in zarr_metadata(plan).items():
        named = manifest.files.get(name) if manifest is not None else None
        try:
            if blake3_hex(store.read(name)) != (named.blake3 if named else blake3_hex(data)):
                problems.append(Problem(name, "is not as it was written", "rewrite"))
        except MissingObjectError:
            problems.append(Problem(name, "is missing", "rewrite"))


def _check_tables(
    store: Store, plan: Plan, manifest: Manifest, entries: Mapping[int, ShardEntry], problems: list[Problem]
) -> None:
    """shards.parquet and index.parquet against the manifest, the listing, and the entries."""
    tables = {}
    for name, schema in ((SHARDS_FILE, SHARDS_SCHEMA), (INDEX_FILE, INDEX_SCHEMA)):
        try:
            data = store.read(name)
            tables[name] = decode_table(data, schema, name)
            if name not in manifest.files or blake3_hex(data) != manifest.files[name].blake3:
                problems.append(Problem(name, f"is not the file that {MANIFEST_FILE} names", "merge"))
            elif len(entries) == plan.num_shards and not tables[name].equals(_TABLE_OF[name](entries.values())):
                problems.append(Problem(name, "says other than the entries in commits/", "merge"))
        except DamagedDataError as err:
            problems.append(Problem(name, reason(err), "merge"))
    known = {problem.name for problem in problems}
    if len(tables) == len(_TABLE_OF) and not known & {LISTING_FILE, PLAN_FILE}:
        listing = read_listing_table(store, plan.listing_blake3, ("key", "label"))
        contradictions = compare_merged(plan, manifest, listing, tables[INDEX_FILE], tables[SHARDS_FILE])
        problems += [
            Problem(wrong.name, wrong.what, "merge") for wrong in contradictions if not known & {wrong.name, *_TABLE_OF}
        ]


_TABLE_OF = {SHARDS_FILE: shards_table, INDEX_FILE: index_table}


def check_sizes(store: Store, entries: Mapping[int, ShardEntry], problems: list[Problem]) -> None:
    """Every object is there and has its size."""
    stats = store.stats("data")
    for entry in entries.values():
        for stored in entry.objects:
            stat = object_stat(store, stats, stored.name)
            if stat is None:
                problems.append(Problem(stored.name, "is missing", "extract", entry.shard))
            elif stat.size != stored.size_bytes:
                what = f"has {stat.size} bytes, its entry says {stored.size_bytes}"
                problems.append(Problem(stored.name, what, "extract", entry.shard))


def check_digests(store: Store, entries: Mapping[int, ShardEntry], problems: list[Problem]) -> None:
    """Every object's blake3 is that of its entry; those with a known problem are left out."""
    known = {problem.name for problem in problems}
    objects = [
        (entry.shard, stored) for entry in entries.values() for stored in entry.objects if stored.name not in known
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        whats = pool.map(lambda listed: _digest_problem(store, listed[1]), objects)
        for (shard_idx, stored), what in zip(objects, whats, strict=True):
            if what is not None:
                problems.append(Problem(stored.name, what, "extract", shard_idx))


def _digest_problem(store: Store, stored: ObjectEntry) -> str | None:
    try:
        intact = object_blake3(store, stored.name, stored.size_bytes) == stored.blake3
    except DamagedDataError as err:
        return reason(err)
    return None if intact else "its bytes are not those of its entry (blake3 differs): damaged, stale or swapped"


def check_chunks(store: Store, plan: Plan, entries: Mapping[int, ShardEntry], problems: list[Problem]) -> int:
    """Every chunk of every row can be read, levels decode to finite values, bad rows are zeros. Returns the number of
    chunks."""
    damaged = {problem.shard for problem in problems}
    good = [entry for shard_idx, entry in entries.items() if shard_idx not in damaged]
    keys = {row.row: row.key for entry in good for row in entry.rows}
    names = [keys.get(row, "") for row in range(plan.num_rows)]
    reader = ChunkReader(store, plan, chunk_tables(plan, shards_table(good), store.url), names)
    codecs = level_codecs(plan.recipe)
    num_chunks = 0
    for entry in good:
        for row in entry.rows:
            for array, what in _row_problems(reader, codecs, row):
                name = reader.tables[array].object_name(entry.shard) or ""
                problems.append(Problem(name, what, "extract", entry.shard))
            num_chunks += sum(spec.chunks_per_row for spec in reader.arrays.values())
    return num_chunks


def _row_problems(reader: ChunkReader, codecs: Mapping[str, LevelCodec], row: IndexRow) -> Iterator[tuple[str, str]]:
    """Array and what is wrong with it in one row."""
    place = f"sample {row.key!r} (row {row.row})"
    values: dict[str, NDArray[np.generic]] = {}
    for name, spec in reader.arrays.items():
        chunks = np.empty((spec.chunks_per_row, *spec.chunk_shape), spec.dtype)
        try:
            reader.read([ChunkRequest(name, row.row, view, chunks[view, ...]) for view in range(len(chunks))])
        except DamagedDataError as err:
            yield name, reason(err)
            continue
        values[name] = chunks
        if row.status != "ok" and chunks.any():
            yield name, f"{name} of {place} is not zero, although the sample is {row.status}"
    for name, codec in codecs.items():
        whole = all(array_name(name, part) in values for part in codec.parts)
        if whole and row.status == "ok" and not np.isfinite(decode_level(codec, parts_of(codec, values))).all():
            yield name, f"{name} of {place} is not finite"
    if KEY in reader.tables:
        try:
            if reader.read_bytes(KEY, row.row) != encode_key(row):
                yield KEY, f"key.json of {place} says otherwise than the index"
        except DamagedDataError as err:
            yield KEY, reason(err)
