"""Checking all that a dataset says of itself: manifest, plan, listing, entries and tables, and what they say of each
other.

One rule: whatever a file holds, it becomes a problem with a name and never an exception; and no name or number that a
file gives is used before it was compared with what the plan implies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from dtpipe.manifests.canonical import blake3_hex, load_record
from dtpipe.manifests.check.evidence import find_plan_evidence, outvoted, read_all, rebuilt_plan
from dtpipe.manifests.check.problems import UNREADABLE, Problem, problem_of, reason
from dtpipe.manifests.codecs.fitted import StoredFitted, fitted_names, read_fitted
from dtpipe.manifests.errors import ConfigError, DtpipeError, ManifestError, MissingObjectError
from dtpipe.manifests.layout.arrays import stored_arrays
from dtpipe.manifests.layout.batches import batch_ranges, lower_batches
from dtpipe.manifests.layout.tables import (
    INDEX_FILE,
    INDEX_SCHEMA,
    LISTING_FILE,
    SHARDS_FILE,
    SHARDS_SCHEMA,
    decode_table,
    in_batches,
    index_table,
    shards_table,
)
from dtpipe.manifests.layout.zarr import zarr_document, zarr_metadata_names
from dtpipe.manifests.read.compare import compare_merged
from dtpipe.manifests.read.places import check_objects
from dtpipe.manifests.schema import Manifest, Plan, ShardEntry
from dtpipe.manifests.store.store import LOCK_FOLDER, Store
from dtpipe.manifests.write.commit import (
    MANIFEST_FILE,
    commit_name,
    committed_shards,
    refuse_misplaced,
    refuse_other_entry,
)
from dtpipe.manifests.write.listing import read_listing_table
from dtpipe.manifests.write.lock import LockRecord
from dtpipe.manifests.write.plan import PLAN_FILE

_NAMED_MISSING = 1000  # missing entries that are named one by one


@dataclass(frozen=True)
class Metadata:
    """What could be read of a dataset's metadata, and is of its plan."""

    manifest: Manifest | None = None
    plan: Plan | None = None
    plan_bytes: bytes | None = None
    """The plan's bytes as they should be; differ from those in the store when they were rebuilt from the manifest."""
    shards: pa.Table = field(default_factory=SHARDS_SCHEMA.empty_table)
    """shards.parquet of the entries that are sound."""
    index: pa.Table = field(default_factory=INDEX_SCHEMA.empty_table)
    """index.parquet of these."""
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    """By shard, of these, where it is not the recipe's."""
    disagreement: str = ""
    """Why nobody can say of which plan the dataset is; then nothing may be changed."""

    @property
    def sound_shards(self) -> set[int]:
        """Shards whose entries are sound."""
        return set(self.shards["shard"].to_pylist())


def check_metadata(store: Store, problems: list[Problem]) -> Metadata:
    """Read manifest, plan, listing, entries and tables; what cannot be read or contradicts becomes a problem."""
    _check_locks(store, problems)
    evidence = find_plan_evidence(store, problems)
    plan, manifest = evidence.plan, evidence.manifest
    if plan is None or evidence.plan_bytes is None:
        return Metadata(manifest, disagreement=evidence.disagreement)
    try:
        stored_arrays(plan.recipe)
    except ConfigError as err:
        problems.append(Problem(PLAN_FILE, reason(err), "nobody"))
        return Metadata(manifest)
    listing = _check_listing(store, plan, problems)
    if listing is not None and listing.num_rows != plan.num_rows:
        problems.append(Problem(PLAN_FILE, f"has {plan.num_rows} rows, its listing {listing.num_rows}", "nobody"))
        return Metadata(manifest)
    plan_blake3 = blake3_hex(evidence.plan_bytes)
    found: list[Problem] = []
    entries = _check_entries(store, plan, plan_blake3, listing, manifest, found)
    if manifest is None and (disagreement := outvoted(plan_blake3, entries.plans)):
        problems.append(Problem(PLAN_FILE, disagreement, "nobody"))
        return Metadata(disagreement=disagreement)
    problems += found
    _check_fitted(store, plan, problems)
    _check_zarr_metadata(store, plan, manifest, problems)
    metadata = Metadata(manifest, plan, evidence.plan_bytes, entries.shards, entries.index, entries.batch_sizes)
    if manifest is not None:
        _check_files(plan, manifest, problems)
        if manifest.complete:
            _check_tables(store, metadata, manifest, plan, listing, problems)
    return metadata


def _check_listing(store: Store, plan: Plan, problems: list[Problem]) -> pa.Table | None:
    try:
        return read_listing_table(store, plan.listing_blake3, ("key", "label"))
    except UNREADABLE as err:
        problems.append(problem_of(LISTING_FILE, err, "source"))
        return None


def _check_locks(store: Store, problems: list[Problem]) -> None:
    for name in store.list(LOCK_FOLDER):
        try:
            load_record(LockRecord, store.read(name), store.where(name))
        except MissingObjectError:
            continue  # a writer that ends removes its lock
        except UNREADABLE as err:
            problems.append(problem_of(name, err, "rewrite"))


@dataclass(frozen=True)
class _Entries:
    """The sound entries, as `Metadata` has them; and how many entries are of which plan."""

    shards: pa.Table
    index: pa.Table
    batch_sizes: Mapping[int, int]
    plans: Counter[str]


def _check_entries(
    store: Store,
    plan: Plan,
    plan_blake3: str,
    listing: pa.Table | None,
    manifest: Manifest | None,
    problems: list[Problem],
) -> _Entries:
    committed = committed_shards(store, plan)
    if manifest is not None and manifest.complete:
        problems += _missing_entries(plan, set(committed))
    plans, batch_sizes = Counter[str](), dict[int, int]()
    shards, index = [SHARDS_SCHEMA.empty_table()], [INDEX_SCHEMA.empty_table()]
    for entries in in_batches(_parsed(store, plan, plan_blake3, committed, plans, problems)):
        for sound in _fitting(store, plan, entries, listing, problems):
            shards.append(shards_table(sound))
            index.append(index_table(sound))
            batch_sizes |= lower_batches(sound)
    return _Entries(pa.concat_tables(shards), pa.concat_tables(index), batch_sizes, plans)


def _missing_entries(plan: Plan, committed: set[int]) -> Iterator[Problem]:
    missing = (shard_idx for shard_idx in range(plan.num_shards) if shard_idx not in committed)
    for shard_idx in islice(missing, _NAMED_MISSING):
        what = "is missing, although the manifest says complete"
        yield Problem(commit_name(shard_idx), what, "extract", shard_idx)
    if next(missing, None) is not None:
        what = f"entries of {plan.num_shards - len(committed)} shards are missing, although the manifest says complete"
        yield Problem("commits", what, "extract")


def _parsed(
    store: Store, plan: Plan, plan_blake3: str, shards: Sequence[int], plans: Counter[str], problems: list[Problem]
) -> Iterator[ShardEntry]:
    """Entries that are whole and of this plan and shard."""
    for shard_idx, (name, data) in zip(shards, read_all(store, map(commit_name, shards)), strict=True):
        try:
            if isinstance(data, DtpipeError):
                raise data
            entry = load_record(ShardEntry, data, store.where(name))
            plans[entry.plan_blake3] += 1
            refuse_other_entry(store, plan, plan_blake3, shard_idx, entry)
            yield entry
        except UNREADABLE as err:
            problems.append(problem_of(name, err, "extract", shard_idx))


def _fitting(
    store: Store, plan: Plan, entries: list[ShardEntry], listing: pa.Table | None, problems: list[Problem]
) -> Iterator[list[ShardEntry]]:
    """Entries with the keys of the listing and the objects of the plan: all at once, or each where one does not."""
    try:
        _check_content(store, plan, entries, listing)
        yield entries
    except ManifestError as err:
        if len(entries) == 1:
            shard_idx = entries[0].shard
            problems.append(Problem(commit_name(shard_idx), reason(err), "extract", shard_idx))
            return
        for entry in entries:
            yield from _fitting(store, plan, [entry], listing, problems)


def _check_content(store: Store, plan: Plan, entries: list[ShardEntry], listing: pa.Table | None) -> None:
    shards = [entry.shard for entry in entries]
    check_objects(plan, shards_table(entries), store.where(commit_name(shards[0])), shards)
    if listing is not None:
        refuse_misplaced(store, entries, index_table(entries), listing)


def _check_fitted(store: Store, plan: Plan, problems: list[Problem]) -> None:
    """What levels were coded with has the digest that is its name."""
    for name in fitted_names(*plan.recipe.levels):
        try:
            read_fitted(store, name)
        except UNREADABLE as err:
            problems.append(problem_of(name, err, "fit"))


def _check_zarr_metadata(store: Store, plan: Plan, manifest: Manifest | None, problems: list[Problem]) -> None:
    fitted, lost = StoredFitted(store), {problem.name for problem in problems if problem.mend == "fit"}
    for name in zarr_metadata_names(plan):
        named = manifest.files.get(name) if manifest is not None else None
        try:
            digest = blake3_hex(store.read(name))
            if named is None and lost:
                continue  # what it should hold follows from that
            if digest != (named.blake3 if named else blake3_hex(zarr_document(plan, name, fitted))):
                problems.append(Problem(name, "is not as it was written", "rewrite"))
        except MissingObjectError:
            problems.append(Problem(name, "is missing", "rewrite"))
        except UNREADABLE as err:
            problems.append(problem_of(name, err, "rewrite"))


def _check_files(plan: Plan, manifest: Manifest, problems: list[Problem]) -> None:
    """The manifest names the files that a dataset has, and the listing of its plan."""
    expected = {PLAN_FILE, LISTING_FILE, SHARDS_FILE, INDEX_FILE}
    expected |= {*zarr_metadata_names(plan), *fitted_names(*plan.recipe.levels)}
    named = manifest.files
    whats = [f"does not name {name}" for name in sorted(expected - named.keys())]
    whats += [f"names {name!r}, which is no file of this dataset" for name in sorted(named.keys() - expected)]
    if LISTING_FILE in named and named[LISTING_FILE].blake3 != plan.listing_blake3:
        whats.append(f"names another {LISTING_FILE} than the plan")
    if not whats and rebuilt_plan(manifest) is None:
        whats.append(f"does not describe {PLAN_FILE} as it is, so that a lost one could not be written again")
    problems += [Problem(MANIFEST_FILE, what, "merge") for what in whats]


def _check_tables(
    store: Store,
    metadata: Metadata,
    manifest: Manifest,
    plan: Plan,
    listing: pa.Table | None,
    problems: list[Problem],
) -> None:
    """shards.parquet and index.parquet against the manifest, the listing, and the entries."""
    tables, all_sound = {}, len(metadata.sound_shards) == plan.num_shards
    if all_sound and manifest.batch_sizes != batch_ranges(metadata.batch_sizes):
        problems.append(Problem(MANIFEST_FILE, "says other batch sizes than the entries in commits/", "merge"))
    known = {problem.name for problem in problems}
    for name, derived in ((SHARDS_FILE, metadata.shards), (INDEX_FILE, metadata.index)):
        try:
            data = store.read(name)
            if name not in manifest.files or blake3_hex(data) != manifest.files[name].blake3:
                problems.append(Problem(name, f"is not the file that {MANIFEST_FILE} names", "merge"))
                continue
            table = decode_table(data, derived.schema, name)
            if all_sound and not table.equals(derived):
                problems.append(Problem(name, "says other than the entries in commits/", "merge"))
                continue
            tables[name] = table
        except UNREADABLE as err:
            problems.append(problem_of(name, err, "merge"))
    if len(tables) == 2 and listing is not None:
        contradictions = compare_merged(plan, manifest, listing, tables[INDEX_FILE], tables[SHARDS_FILE])
        problems += [Problem(wrong.name, wrong.what, "merge") for wrong in contradictions if wrong.name not in known]
