"""Reading a feature dataset, fail-closed: what comes back is what was written, or an error says what and where.

One rule: manifest.json is the only entry point. A dataset without one, or with shards sent back to work, is read only
on request. Bad rows are never handed out.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.codecs.coded import CodedLevels, PackedChunks
from dtpipe.manifests.codecs.fitted import StoredFitted
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import ConfigError, IncompleteError, InputError, ManifestError, MissingObjectError
from dtpipe.manifests.layout.tables import (
    INDEX_FILE,
    INDEX_SCHEMA,
    SHARDS_FILE,
    SHARDS_SCHEMA,
    decode_rows,
    decode_table,
    in_batches,
    index_table,
    shards_table,
)
from dtpipe.manifests.read.buffers import Buffers
from dtpipe.manifests.read.chunks import ChunkReader
from dtpipe.manifests.read.compare import MISSING, compare_bad_rows, compare_merged
from dtpipe.manifests.read.located import ChunkRequest
from dtpipe.manifests.read.places import ChunkTable, chunk_tables
from dtpipe.manifests.read.source import Columns, Integers
from dtpipe.manifests.read.texts import Texts, rows_with
from dtpipe.manifests.schema import IMAGE, Manifest, Plan
from dtpipe.manifests.store.cache import ObjectCache
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import COMMIT_FOLDER, MANIFEST_FILE, load_entries, load_manifest, refuse_misplaced
from dtpipe.manifests.write.listing import read_listing_table
from dtpipe.manifests.write.plan import PLAN_FILE, load_plan, plan_digest


class FeatureDataset:
    """One dataset, open for reading; safe to use from many threads and processes. Make one with `open`."""

    def __init__(
        self, store: Store, plan: Plan, manifest: Manifest | None, columns: Columns, chunks: ChunkReader
    ) -> None:
        self.store, self.plan, self.manifest, self.columns = store, plan, manifest, columns
        self.url, self.recipe = store.url, plan.recipe
        self.levels, self.views = plan.recipe.levels, plan.recipe.views
        self.image_px = plan.recipe.transform.height, plan.recipe.transform.width
        self._chunks, self.codecs = chunks, level_codecs(plan.recipe, StoredFitted(store))
        self._buffers = Buffers()
        self.keeps_packed = False
        """Whether symbols under rans are read as they are stored, for a device that decodes them."""

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        allow_incomplete: bool = False,
        shards: Collection[int] | None = None,
        cache: ObjectCache | None = None,
    ) -> FeatureDataset:
        """Open a dataset and check manifest, plan, index and shard table against their digests.

        With `allow_incomplete` an unfinished dataset opens with the shards it has; rows of others have status
        `missing`. So have rows that are not of `shards`, where that is given. Objects of a remote dataset are fetched
        whole into `cache`, where one is given and has room, when one of their chunks is read.
        Raises: InputError when there is none; IncompleteError when it is unfinished, or lacks one of `shards`;
        ManifestError naming what is damaged.
        """
        dataset = cls._open(Store(url), allow_incomplete)
        if shards is not None:
            dataset._keep_shards(shards)
        if dataset.store.local is None and cache is not None:
            dataset._chunks.keep_in(cache)
        return dataset

    @classmethod
    def _open(cls, store: Store, allow_incomplete: bool) -> FeatureDataset:
        manifest = _find_manifest(store)
        if manifest is not None and manifest.complete:
            return _open_complete(store, manifest)
        if not allow_incomplete:
            why = "is unfinished" if manifest is None else "has shards that a repair sent back to work"
            raise IncompleteError(
                f"{store.url} {why}; run the same `dtpipe extract` again, or read what is there with --allow-incomplete"
            )
        return _open_partial(store, manifest)

    def __repr__(self) -> str:
        return f"FeatureDataset({self.url!r}, {len(self.columns)} rows)"

    @property
    def shards(self) -> tuple[int, ...]:
        """Shards that are committed, or of these the ones it was opened with."""
        rows = np.flatnonzero(~rows_with(self.columns.status, MISSING))
        return tuple(np.unique(rows // self.recipe.shard.samples).tolist())

    def read(
        self, rows: Integers, names: Sequence[str], views: Integers, images: bool = True
    ) -> tuple[NDArray[np.uint8], CodedLevels]:
        """As `FeatureSource.read`."""
        return self._read(np.asarray(rows, np.int64), names, np.asarray(views, np.int64), images)

    def _read(
        self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64], images: bool
    ) -> tuple[NDArray[np.uint8], CodedLevels]:
        self._check(rows, names, views, images)
        codecs = {name: self.codecs[name] for name in names}
        specs = [spec for spec in self._chunks.arrays.values() if spec.level in codecs]
        left = [spec for spec in specs if self.keeps_packed and spec.tables is not None]
        as_stored = {spec.name: self._chunks.packed_request(spec.name, rows, views) for spec in left}
        specs, empty = [spec for spec in specs if spec.name not in as_stored], self._buffers.empty
        arrays = {spec.name: empty((len(rows), *spec.chunk_shape), spec.dtype) for spec in specs}
        pixels = empty((len(rows) if images else 0, *self.image_px, 3), np.uint8)
        requests = [*(ChunkRequest(name, rows, views, out) for name, out in arrays.items()), *as_stored.values()]
        if images:
            requests.append(ChunkRequest(IMAGE, rows, np.zeros_like(rows), pixels))
        self._chunks.read(requests)
        return pixels, CodedLevels.of_arrays(len(rows), codecs, arrays, self._packed(as_stored))

    def _packed(self, as_stored: Mapping[str, ChunkRequest]) -> dict[str, PackedChunks]:
        """Of requests that were read, by array."""
        packed = {}
        for name, request in as_stored.items():
            load = self._chunks.arrays[name].tables
            assert load is not None and request.starts is not None, "only arrays under rans are left packed"
            packed[name] = PackedChunks(request.out.view(np.uint8), request.starts, load())
        return packed

    def _keep_shards(self, shards: Collection[int]) -> None:
        """Rows of other shards count as missing."""
        if lost := sorted(set(shards) - set(self.shards)):
            raise IncompleteError(
                f"{self.url}: shard {lost[0]} is needed and not committed; run the same `dtpipe extract` again"
            )
        kept = np.isin(np.arange(len(self.columns)) // self.recipe.shard.samples, list(shards))
        status = pc.if_else(pa.array(kept), pa.array(self.columns.status, pa.string()), MISSING)
        self.columns = replace(self.columns, status=Texts(pa.chunked_array([status])))

    def _check(self, rows: NDArray[np.int64], names: Sequence[str], views: NDArray[np.int64], images: bool) -> None:
        if unknown := [name for name in names if name not in self.codecs]:
            raise ConfigError(f"{self.url} has no level {unknown[0]!r}; choose from {', '.join(self.codecs)}")
        if images and self.recipe.images != "stored":
            raise ConfigError(f"{self.url} stores no images; join it with the dataset that has them (--join)")
        if len(views) != len(rows):
            raise ConfigError(f"{len(rows)} rows and {len(views)} views were asked for; give one view per row")
        readable, known = self.columns.is_ok, (rows >= 0) & (rows < len(self.columns))
        for row in rows[~(known & readable[np.where(known, rows, 0)])].tolist():
            self._refuse_row(row)
        for view in views[(views < 0) | (views >= len(self.views))].tolist():
            raise ConfigError(f"{self.url} has no view {view}; it has views 0 to {len(self.views) - 1}")

    def _refuse_row(self, row: int) -> None:
        """Raises: what is wrong with a row that cannot be read."""
        if not 0 <= row < len(self.columns):
            raise InputError(f"{self.url} has no row {row}; it has rows 0 to {len(self.columns) - 1}")
        key, status = self.columns.keys[row], self.columns.status[row]
        if status == MISSING:
            raise IncompleteError(
                f"{self.url}: sample {key!r} (row {row}) is not written yet; run `dtpipe extract` again"
            )
        raise InputError(f"{self.url}: sample {key!r} (row {row}) is {status}; read only `ok_rows`")


def _find_manifest(store: Store) -> Manifest | None:
    try:
        return load_manifest(store)
    except MissingObjectError as err:
        if store.exists(PLAN_FILE):
            return None
        raise InputError(
            f"{store.url} holds no feature dataset (no {MANIFEST_FILE}, no {PLAN_FILE}); check the path"
        ) from err


def _open_complete(store: Store, manifest: Manifest) -> FeatureDataset:
    _checked_file(store, manifest, PLAN_FILE)
    plan = load_plan(store)
    with ThreadPoolExecutor(3) as pool:  # each takes its time, to fetch and to decode
        tables = [pool.submit(read, store, plan, manifest) for read in (_read_index, _read_shards, _read_listing)]
        index, shards, listing = (table.result() for table in tables)
    for wrong in compare_merged(plan, manifest, listing, index, shards):
        raise ManifestError(f"{store.where(wrong.name)}: {wrong.what}; {_REPAIR}")
    places = chunk_tables(plan, shards, store.where(SHARDS_FILE), np.arange(plan.num_shards))
    return _assemble(store, plan, manifest, listing, index["status"], places)


def _read_index(store: Store, _: Plan, manifest: Manifest) -> pa.Table:
    data = _checked_file(store, manifest, INDEX_FILE)
    return decode_rows(data, INDEX_SCHEMA, store.where(INDEX_FILE), ("key", "label", "status"))


def _read_shards(store: Store, _: Plan, manifest: Manifest) -> pa.Table:
    return decode_table(_checked_file(store, manifest, SHARDS_FILE), SHARDS_SCHEMA, store.where(SHARDS_FILE))


def _read_listing(store: Store, plan: Plan, _: Manifest | None = None) -> pa.Table:
    return read_listing_table(store, plan.listing_blake3, ("key", "label"))


def _open_partial(store: Store, manifest: Manifest | None) -> FeatureDataset:
    """From plan, listing and the entries there are; the merged tables of a repaired dataset are not used."""
    plan = load_plan(store)
    listing = _read_listing(store, plan)
    if listing.num_rows != plan.num_rows:
        raise ManifestError(
            f"{store.where(PLAN_FILE)} has {plan.num_rows} rows, the listing {listing.num_rows}; {_REPAIR}"
        )
    status = np.full(plan.num_rows, MISSING, object)
    shards, committed = [SHARDS_SCHEMA.empty_table()], list[int]()
    for entries in in_batches(load_entries(store, plan, plan_digest(store), partial=True)):
        index = index_table(entries)
        refuse_misplaced(store, entries, index, listing)
        shards.append(shards_table(entries))
        committed += [entry.shard for entry in entries]
        status[index["row"].to_numpy()] = index["status"].to_numpy()
    column = pa.chunked_array([pa.array(status, pa.string())])
    tables = chunk_tables(plan, pa.concat_tables(shards), store.where(COMMIT_FOLDER), committed)
    return _assemble(store, plan, manifest, listing, column, tables)


_REPAIR = "run `dtpipe verify --repair` on the dataset and extract again"


def _assemble(
    store: Store,
    plan: Plan,
    manifest: Manifest | None,
    listing: pa.Table,
    status: pa.ChunkedArray,
    tables: Mapping[str, ChunkTable],
) -> FeatureDataset:
    columns = Columns(store.url, Texts(listing["key"]), Texts(listing["label"]), Texts(status))
    reader = ChunkReader(store, plan, tables, columns.keys)
    for wrong in compare_bad_rows(reader, columns):
        raise ManifestError(f"{store.where(wrong.name)}: {wrong.what}; {_REPAIR}")
    return FeatureDataset(store, plan, manifest, columns, reader)


def _checked_file(store: Store, manifest: Manifest, name: str) -> bytes:
    """A file's bytes, if they are those that the manifest names."""
    if name not in manifest.files:
        raise ManifestError(f"{store.where(MANIFEST_FILE)} does not name {name}; it was not written by dtpipe")
    data = store.read(name)
    if blake3_hex(data) != manifest.files[name].blake3:
        raise ManifestError(
            f"{store.where(name)} is not the file that {MANIFEST_FILE} names: damaged, or one of them is stale; "
            f"{_REPAIR}"
        )
    return data
