"""Commits and the merge: how shards that many workers wrote become one dataset.

One rule: an entry is written after its objects and is the only sign that a shard is done; the manifest is written
after everything it names and is the only sign that a dataset is done. Before each publish the lock's epoch is checked,
and the merge looks at every object again, because a deposed writer may have been in the middle of a write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from blake3 import blake3

from dtpipe.manifests.canonical import blake3_hex, dump_record, load_record
from dtpipe.manifests.codecs.fitted import fitted_names
from dtpipe.manifests.errors import IncompleteError, ManifestError, MissingObjectError
from dtpipe.manifests.layout.batches import batch_ranges, lower_batches
from dtpipe.manifests.layout.digest import dataset_digest
from dtpipe.manifests.layout.tables import (
    INDEX_FILE,
    LISTING_FILE,
    SHARDS_FILE,
    encode_table,
    in_batches,
    index_table,
    shards_table,
)
from dtpipe.manifests.layout.zarr import zarr_metadata_names
from dtpipe.manifests.schema import BatchRange, FileEntry, Manifest, ObjectEntry, Plan, ShardEntry, Totals
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.local import ObjectStat
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.listing import read_listing_table
from dtpipe.manifests.write.lock import Lock, check_epoch
from dtpipe.manifests.write.plan import PLAN_FILE, plan_digest

MANIFEST_FILE = "manifest.json"
COMMIT_FOLDER = "commits/"
REJECTED = ".rejected"
_COMMIT = re.compile(rf"{COMMIT_FOLDER}([0-9]{{5}}|[1-9][0-9]{{5,9}})\.json")
_THREADS = 16  # requests to the store at once
_READ_AHEAD = 512  # entries whose bytes are held at once
_BLOCK_BYTES = 16 * 2**20
_REPAIR = "run `dtpipe verify --repair` on the dataset and extract again"
_SHOWN = 5  # shards listed in a message
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def commit_name(shard_idx: int) -> str:
    """Object name of a shard's entry."""
    return f"{COMMIT_FOLDER}{shard_idx:05d}.json"


def committed_shards(store: Store, plan: Plan) -> list[int]:
    """Shards that have an entry, in order."""
    names = store.list(COMMIT_FOLDER)
    numbers = sorted(int(number[1]) for name in names if (number := _COMMIT.fullmatch(name)))
    return [number for number in numbers if number < plan.num_shards]


def pending_shards(store: Store, plan: Plan) -> list[int]:
    """Shards still to be written: the plan minus the commits, in order."""
    done = set(committed_shards(store, plan))
    return [shard_idx for shard_idx in range(plan.num_shards) if shard_idx not in done]


def commit_entry(store: Store, entry: ShardEntry, epoch: int) -> None:
    """Commit a shard whose objects are written. A second commit of equal content is fine.

    Raises: LockHeldError when another writer took over; IncompleteError when another attempt committed other content.
    """
    if entry.epoch != epoch:
        raise ManifestError(
            f"{store.url}: shard {entry.shard} was written in epoch {entry.epoch}, and this is {epoch}; write it again"
        )
    check_epoch(store, epoch)
    fault_point("commit.before")
    name = commit_name(entry.shard)
    if not store.create(name, dump_record(entry)):
        stored = load_record(ShardEntry, store.read(name), store.where(name))
        if _content(stored) != _content(entry):
            raise IncompleteError(
                f"{store.where(name)}: another attempt at shard {entry.shard} committed other content; "
                "the merge looks at the objects and sends the shard back if they do not fit: run again"
            )
    fault_point("commit.after")


def load_entry(store: Store, plan: Plan, plan_blake3: str, shard_idx: int) -> ShardEntry:
    """Read one shard's entry and see that it is of this plan and has its rows.

    Raises: MissingObjectError; ManifestError naming the entry and what contradicts.
    """
    return _parse_entry(store, plan, plan_blake3, shard_idx, store.read(commit_name(shard_idx)))


def _parse_entry(store: Store, plan: Plan, plan_blake3: str, shard_idx: int, data: bytes) -> ShardEntry:
    entry = load_record(ShardEntry, data, store.where(commit_name(shard_idx)))
    refuse_other_entry(store, plan, plan_blake3, shard_idx, entry)
    return entry


def refuse_other_entry(store: Store, plan: Plan, plan_blake3: str, shard_idx: int, entry: ShardEntry) -> None:
    """See that an entry is of this plan and shard, and has its rows.

    Raises: ManifestError naming the entry and what contradicts.
    """
    rows = plan.shard_rows(shard_idx)
    if entry.shard != shard_idx:
        problem = f"is the entry of shard {entry.shard}"
    elif entry.plan_blake3 != plan_blake3:
        problem = f"belongs to another plan ({entry.plan_blake3[:12]}, here {plan_blake3[:12]})"
    elif not _holds_rows(entry, rows):
        problem = f"does not hold rows {rows.start} to {rows.stop - 1}"
    elif len({stored.name for stored in entry.objects}) != len(entry.objects):
        problem = "names an object twice"
    elif entry.batch_size is not None and entry.batch_size >= plan.recipe.compute.batch_size:
        problem = f"says batches of {entry.batch_size}, which is not below the recipe's"
    else:
        return
    where = store.where(commit_name(shard_idx))
    raise ManifestError(f"{where} {problem}; run `dtpipe verify --repair {store.url}` and extract again")


def load_entries(store: Store, plan: Plan, plan_blake3: str, partial: bool = False) -> Iterator[ShardEntry]:
    """All entries in shard order, read ahead in threads; with `partial` those that are there.

    Nothing is kept: a hundred thousand entries need not fit into memory together.
    Raises: IncompleteError when shards are missing; ManifestError naming a damaged entry.
    """
    done = committed_shards(store, plan)
    if not partial and len(done) < plan.num_shards:
        missing = sorted(set(range(plan.num_shards)) - set(done))
        raise IncompleteError(
            f"{store.url}: {len(missing)} of {count_of(plan.num_shards, 'shard')} not written yet ({_some(missing)}); "
            "run the same `dtpipe extract` again"
        )
    return _read_entries(store, plan, plan_blake3, done)


def _read_entries(store: Store, plan: Plan, plan_blake3: str, shards: Sequence[int]) -> Iterator[ShardEntry]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(shards), _READ_AHEAD):
            some = shards[first : first + _READ_AHEAD]
            for shard_idx, data in zip(some, pool.map(store.read, map(commit_name, some)), strict=True):
                yield _parse_entry(store, plan, plan_blake3, shard_idx, data)


def reject_entry(store: Store, shard_idx: int) -> str:
    """Send a shard back to work: its entry gets a name that counts no more, which is returned. Nothing is deleted."""
    return put_aside(store, commit_name(shard_idx))


def put_aside(store: Store, name: str) -> str:
    """Give a file a free name beside its own, ending in `.rejected`, which is returned. Nothing is deleted."""
    present = set(store.list(name))
    names = (f"{name}{REJECTED}" + (f".{count}" if count else "") for count in range(len(present) + 1))
    new = next(free for free in names if free not in present)
    store.rename(name, new)
    return new


def merge(store: Store, plan: Plan, lock: Lock, provenance: Mapping[str, Any]) -> Manifest:
    """Make the dataset of all committed shards: shards.parquet, index.parquet and, last, manifest.json.

    Every object is compared with its entry: by size and identity, and where the identity differs by content, since a
    late writer may have written the same bytes again. Shards that do not fit are sent back to work.
    Raises: IncompleteError when shards are missing or were sent back: extract again; ManifestError naming a damaged
    file; LockHeldError when another writer took over.
    """
    lock.check()
    listing = read_listing_table(store, plan.listing_blake3, ("key", "label"))
    shards, index, batch_sizes = _gather(store, plan, listing, lock)
    files = _metadata_files(store, plan)
    for name, table, step in ((SHARDS_FILE, shards, "merge.shards"), (INDEX_FILE, index, "merge.index")):
        data = encode_table(table)
        lock.check()
        store.write(name, data)
        files[name] = FileEntry(size_bytes=len(data), blake3=blake3_hex(data))
        fault_point(step)
    manifest = _manifest(plan, shards, index, batch_sizes, dict(sorted(files.items())), provenance)
    lock.check()
    fault_point("merge.before_manifest")
    store.write(MANIFEST_FILE, dump_record(manifest))
    fault_point("merge.after")
    return manifest


def load_manifest(store: Store) -> Manifest:
    """Read manifest.json.

    Raises: MissingObjectError when the dataset was never merged, ManifestError when a byte changed.
    """
    return load_record(Manifest, store.read(MANIFEST_FILE), store.where(MANIFEST_FILE))


def object_fits(store: Store, stored: ObjectEntry, present: ObjectStat | None) -> bool:
    """True if the object in the store is the one of its entry; it is read only when it was written again."""
    if present is None or present.size != stored.size_bytes:
        return False
    return present.identity == stored.identity or object_blake3(store, stored.name, present.size) == stored.blake3


def object_stat(store: Store, stats: Mapping[str, ObjectStat], name: str) -> ObjectStat | None:
    """Size and identity of an object by the listing `stats`, or by asking for it alone; None when it is missing."""
    if name in stats:
        return stats[name]
    try:
        return store.stat(name)  # outside `data`, or behind a link that listings do not follow
    except MissingObjectError:
        return None


def object_blake3(store: Store, name: str, size: int) -> str:
    """blake3 of an object of `size` bytes, read in blocks."""
    digest = blake3()
    for offset in range(0, size, _BLOCK_BYTES):
        digest.update(store.read_range(name, offset, min(_BLOCK_BYTES, size - offset)))
    return digest.hexdigest()


def _content(entry: ShardEntry) -> dict[str, Any]:
    fields = entry.model_dump(exclude={"epoch", "provenance", "objects"})
    return {**fields, "objects": [stored.model_dump(exclude={"identity"}) for stored in entry.objects]}


def _holds_rows(entry: ShardEntry, rows: range) -> bool:
    expected = zip(entry.rows, rows, strict=False)
    return len(entry.rows) == len(rows) and all((row.row, row.shard) == (idx, entry.shard) for row, idx in expected)


def _gather(
    store: Store, plan: Plan, listing: pa.Table, lock: Lock
) -> tuple[pa.Table, pa.Table, tuple[BatchRange, ...]]:
    """shards.parquet and index.parquet as tables, and batch sizes, if all entries fit the listing and their objects."""
    stats, misfits, lower = store.stats("data"), list[int](), dict[int, int]()
    tables: tuple[list[pa.Table], list[pa.Table]] = [], []
    for entries in in_batches(load_entries(store, plan, plan_digest(store))):
        tables[0].append(shards_table(entries))
        tables[1].append(index_table(entries))
        refuse_misplaced(store, entries, tables[1][-1], listing)
        misfits += _misfits(store, entries, stats)
        lower |= lower_batches(entries)
    _send_back(store, misfits, lock)
    # whole here, so that encoding copies nothing while the parts are still held
    shards, index = (pa.concat_tables(parts).combine_chunks() for parts in tables)
    return shards, index, batch_ranges(lower)


def refuse_misplaced(store: Store, entries: Sequence[ShardEntry], index: pa.Table, listing: pa.Table) -> None:
    """See that entries have the keys and labels that the listing has in their rows; `index` is their `index_table`.

    Raises: ManifestError naming the entry and its row.
    """
    rows = index["row"].to_numpy()
    consecutive = np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))  # but where shards are missing
    planned = listing.slice(rows[0], len(rows)) if consecutive else listing.take(pa.array(rows))
    if all(index[name].equals(planned[name]) for name in ("key", "label")):
        return
    for entry in entries:
        for row in entry.rows:
            key, label = (listing[name][row.row].as_py() for name in ("key", "label"))
            if (row.key, row.label) != (key, label):
                raise ManifestError(
                    f"{store.where(commit_name(entry.shard))}: row {row.row} is {row.key!r} (label {row.label}), "
                    f"the listing says {key!r} ({label}); {_REPAIR}"
                )


def _misfits(store: Store, entries: Sequence[ShardEntry], stats: Mapping[str, ObjectStat]) -> list[int]:
    """Shards whose objects are not those of their entries; only what was written again is read."""

    def fits(listed: tuple[int, ObjectEntry]) -> bool:
        return object_fits(store, listed[1], object_stat(store, stats, listed[1].name))

    suspects = [
        (entry.shard, stored)
        for entry in entries
        for stored in entry.objects
        if (present := stats.get(stored.name)) is None
        or (present.size, present.identity) != (stored.size_bytes, stored.identity)
    ]
    fitting = _together(fits, suspects) if suspects else []
    return sorted({shard_idx for (shard_idx, _), fit in zip(suspects, fitting, strict=True) if not fit})


def _send_back(store: Store, misfits: list[int], lock: Lock) -> None:
    for shard_idx in misfits:
        lock.check()
        reject_entry(store, shard_idx)
        fault_point("merge.rejected")
    if misfits:
        raise IncompleteError(
            f"{store.url}: objects of {count_of(len(misfits), 'shard')} are missing or were changed after their commit "
            f"({_some(misfits)}); they were sent back to work: run the same `dtpipe extract` again"
        )


def _metadata_files(store: Store, plan: Plan) -> dict[str, FileEntry]:
    names = [PLAN_FILE, LISTING_FILE, *zarr_metadata_names(plan), *fitted_names(*plan.recipe.levels)]
    return {
        name: FileEntry(size_bytes=len(data), blake3=blake3_hex(data))
        for name, data in zip(names, _together(store.read, names), strict=True)
    }


def _manifest(
    plan: Plan,
    shards: pa.Table,
    index: pa.Table,
    batch_sizes: tuple[BatchRange, ...],
    files: dict[str, FileEntry],
    provenance: Mapping[str, Any],
) -> Manifest:
    kept = {**provenance, "plan": plan.provenance}  # so that a lost plan.json can be written again, byte for byte
    return Manifest(
        format=plan.format,
        complete=True,
        digest=dataset_digest(plan.recipe, index["key"], shards, batch_sizes),
        recipe=plan.recipe,
        batch_sizes=batch_sizes,
        totals=totals_of(plan, shards, index["status"]),
        files=files,
        provenance=kept,
    )


def totals_of(plan: Plan, shards: pa.Table, status: pa.ChunkedArray) -> Totals:
    """The counts of a whole dataset, from the tables that are merged."""
    num_ok = pc.sum(pc.equal(status, "ok")).as_py() or 0
    return Totals(
        num_rows=plan.num_rows,
        num_ok=num_ok,
        num_bad=plan.num_rows - num_ok,
        num_shards=plan.num_shards,
        size_bytes=pc.sum(shards["size_bytes"]).as_py() or 0,
    )


def _together(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Results in order of items; requests to a store take their time, so several run at once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def _some(shards: list[int]) -> str:
    more = ", ..." if len(shards) > _SHOWN else ""
    return ", ".join(str(shard_idx) for shard_idx in shards[:_SHOWN]) + more
