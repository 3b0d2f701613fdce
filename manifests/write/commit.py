"""Commits and the merge: how shards that many workers wrote become one dataset.

One rule: an entry is written after its objects and is the only sign that a shard is done; the manifest is written
after everything it names and is the only sign that a dataset is done. Before each publish the lock's epoch is checked,
and the merge looks at every object again, because a deposed writer may have been in the middle of a write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from blake3 import blake3

from dtpipe.manifests.canonical import blake3_hex, canonical_json, dump_record, load_record
from dtpipe.manifests.errors import IncompleteError, ManifestError, MissingObjectError
from dtpipe.manifests.layout.tables import INDEX_FILE, LISTING_FILE, SHARDS_FILE, encode_index, encode_shards
from dtpipe.manifests.layout.zarr import zarr_metadata
from dtpipe.manifests.schema import FileEntry, Manifest, ObjectEntry, Plan, Recipe, ShardEntry, Totals
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.local import ObjectStat
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import Listing, read_listing
from dtpipe.manifests.write.lock import Lock, check_epoch
from dtpipe.manifests.write.plan import PLAN_FILE, plan_digest

MANIFEST_FILE = "manifest.json"
COMMIT_FOLDER = "commits/"
REJECTED = ".rejected"
_THREADS = 16  # requests to the store at once
_BLOCK_BYTES = 16 * 2**20
_SHOWN = 5  # shards listed in a message
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def commit_name(shard_idx: int) -> str:
    """Object name of a shard's entry."""
    return f"{COMMIT_FOLDER}{shard_idx:05d}.json"


def committed_shards(store: Store, plan: Plan) -> list[int]:
    """Shards that have an entry, in order."""
    names = set(store.list(COMMIT_FOLDER))
    return [shard_idx for shard_idx in range(plan.num_shards) if commit_name(shard_idx) in names]


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
    where = store.where(commit_name(shard_idx))
    entry = load_record(ShardEntry, store.read(commit_name(shard_idx)), where)
    rows = plan.shard_rows(shard_idx)
    if entry.shard != shard_idx:
        problem = f"is the entry of shard {entry.shard}"
    elif entry.plan_blake3 != plan_blake3:
        problem = f"belongs to another plan ({entry.plan_blake3[:12]}, here {plan_blake3[:12]})"
    elif [row.row for row in entry.rows] != list(rows) or any(row.shard != shard_idx for row in entry.rows):
        problem = f"does not hold rows {rows.start} to {rows.stop - 1}"
    elif len({stored.name for stored in entry.objects}) != len(entry.objects):
        problem = "names an object twice"
    else:
        return entry
    raise ManifestError(f"{where} {problem}; run `dtpipe verify --repair {store.url}` and extract again")


def load_entries(store: Store, plan: Plan, plan_blake3: str, partial: bool = False) -> list[ShardEntry]:
    """All entries in shard order; with `partial` those that are there.

    Raises: IncompleteError when shards are missing; ManifestError naming a damaged entry.
    """
    done = committed_shards(store, plan)
    if not partial and len(done) < plan.num_shards:
        missing = sorted(set(range(plan.num_shards)) - set(done))
        raise IncompleteError(
            f"{store.url}: {len(missing)} of {plan.num_shards} shards are not written ({_some(missing)}); "
            "run the same `dtpipe extract` again"
        )
    return _together(lambda shard_idx: load_entry(store, plan, plan_blake3, shard_idx), done)


def reject_entry(store: Store, shard_idx: int) -> str:
    """Send a shard back to work: its entry gets a name that counts no more, which is returned. Nothing is deleted."""
    old = commit_name(shard_idx)
    present = set(store.list(old))
    names = (f"{old}{REJECTED}" + (f".{count}" if count else "") for count in range(len(present) + 1))
    new = next(name for name in names if name not in present)
    store.rename(old, new)
    return new


def dataset_digest(recipe: Recipe, keys: Sequence[str], objects: Iterable[tuple[str, int, str]]) -> str:
    """Digest of a dataset's content: equal for any number of workers and after kills.

    `keys` by row; `objects` as (name, size in bytes, blake3), in any order. Times, hosts, URIs and versions stay out.
    """
    stored = [{"name": name, "size": size, "blake3": digest} for name, size, digest in sorted(objects)]
    document = {
        "format": recipe.format,
        "recipe": recipe.model_dump(mode="json"),
        "keys": list(keys),
        "objects": stored,
    }
    return blake3_hex(canonical_json(document))


def merge(store: Store, plan: Plan, lock: Lock, provenance: Mapping[str, Any]) -> Manifest:
    """Make the dataset of all committed shards: shards.parquet, index.parquet and, last, manifest.json.

    Every object is compared with its entry: by size and identity, and where the identity differs by content, since a
    late writer may have written the same bytes again. Shards that do not fit are sent back to work.
    Raises: IncompleteError when shards are missing or were sent back: extract again; ManifestError naming a damaged
    file; LockHeldError when another writer took over.
    """
    lock.check()
    digest = plan_digest(store)
    listing = read_listing(store, plan.listing_blake3)
    entries = load_entries(store, plan, digest)
    _check_keys(store, entries, listing)
    _send_back_misfits(store, entries, lock)
    files = _metadata_files(store, plan)
    for name, data, step in (
        (SHARDS_FILE, encode_shards(entries), "merge.shards"),
        (INDEX_FILE, encode_index(entries), "merge.index"),
    ):
        lock.check()
        store.write(name, data)
        files[name] = FileEntry(size_bytes=len(data), blake3=blake3_hex(data))
        fault_point(step)
    manifest = _manifest(plan, entries, listing, dict(sorted(files.items())), provenance)
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


def _check_keys(store: Store, entries: list[ShardEntry], listing: Listing) -> None:
    for entry in entries:
        for row in entry.rows:
            if (row.key, row.label) != (listing.keys[row.row], listing.labels[row.row]):
                raise ManifestError(
                    f"{store.where(commit_name(entry.shard))}: row {row.row} is {row.key!r} (label {row.label}), "
                    f"the listing says {listing.keys[row.row]!r} ({listing.labels[row.row]}); "
                    f"run `dtpipe verify --repair {store.url}` and extract again"
                )


def _send_back_misfits(store: Store, entries: list[ShardEntry], lock: Lock) -> None:
    stats = store.stats("data")

    def fits(entry: ShardEntry) -> bool:
        return all(object_fits(store, stored, object_stat(store, stats, stored.name)) for stored in entry.objects)

    misfits = [entry.shard for entry, fit in zip(entries, _together(fits, entries), strict=True) if not fit]
    for shard_idx in misfits:
        lock.check()
        reject_entry(store, shard_idx)
        fault_point("merge.rejected")
    if misfits:
        raise IncompleteError(
            f"{store.url}: objects of {len(misfits)} shards are missing or were changed after their commit "
            f"({_some(misfits)}); they were sent back to work: run the same `dtpipe extract` again"
        )


def _metadata_files(store: Store, plan: Plan) -> dict[str, FileEntry]:
    names = [PLAN_FILE, LISTING_FILE, *(zarr_metadata(plan) if plan.recipe.shard.format == "zarr" else ())]
    return {
        name: FileEntry(size_bytes=len(data), blake3=blake3_hex(data))
        for name, data in zip(names, _together(store.read, names), strict=True)
    }


def _manifest(
    plan: Plan, entries: list[ShardEntry], listing: Listing, files: dict[str, FileEntry], provenance: Mapping[str, Any]
) -> Manifest:
    objects = [(stored.name, stored.size_bytes, stored.blake3) for entry in entries for stored in entry.objects]
    num_ok = sum(row.status == "ok" for entry in entries for row in entry.rows)
    totals = Totals(
        num_rows=plan.num_rows,
        num_ok=num_ok,
        num_bad=plan.num_rows - num_ok,
        num_shards=plan.num_shards,
        size_bytes=sum(size for _, size, _ in objects),
    )
    digest = dataset_digest(plan.recipe, listing.keys, objects)
    kept = {**provenance, "plan": plan.provenance}  # so that a lost plan.json can be written again, byte for byte
    return Manifest(
        format=plan.format,
        complete=True,
        digest=digest,
        recipe=plan.recipe,
        totals=totals,
        files=files,
        provenance=kept,
    )


def _together(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Results in order of items; requests to a store take their time, so several run at once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def _some(shards: list[int]) -> str:
    more = ", ..." if len(shards) > _SHOWN else ""
    return ", ".join(str(shard_idx) for shard_idx in shards[:_SHOWN]) + more
