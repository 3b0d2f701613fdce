"""Bytes of a whole dataset: of one that is there, and of one to come, foretold by a few of its rows.

One rule: all that the store holds of it counts: slots of chunks that a shard does not have, and what is written once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dtpipe.manifests.canonical import blake3_hex, dump_record
from dtpipe.manifests.codecs.fitted import HeldFitted
from dtpipe.manifests.layout.arrays import EncodedObject
from dtpipe.manifests.layout.tables import encode_table, index_table, shards_table
from dtpipe.manifests.layout.zarr import zarr_metadata
from dtpipe.manifests.schema import IndexRow, Manifest, ObjectEntry, Plan, ShardEntry
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import COMMIT_FOLDER, MANIFEST_FILE
from dtpipe.manifests.write.listing import Listing, encode_listing
from dtpipe.manifests.write.shard import SHARD_FORMATS

_RECORDS_BYTES: Final = 16_000  # plan.json and manifest.json: settings, versions, times
_ENTRY_BYTES: Final = 1_200  # of a shard's entry beside its rows: versions, times
_OBJECT_BYTES: Final = 300  # of an object's name and digests, in entries and tables
_IDENTITY: Final = "1" * 19  # as long as a time in ns


@dataclass(frozen=True)
class DatasetBytes:
    """Of a whole dataset."""

    objects: float
    """Of its shards."""
    files: float
    """Of tables, entries, records, metadata, and what codecs were fitted with."""

    @property
    def total(self) -> float:
        """Of all of it."""
        return self.objects + self.files


def size_of(store: Store, manifest: Manifest) -> int:
    """Bytes of a dataset that is complete."""
    entries = sum(stat.size for stat in store.stats(COMMIT_FOLDER).values())
    files = sum(file.size_bytes for file in manifest.files.values())
    return manifest.totals.size_bytes + entries + files + store.size(MANIFEST_FILE)


def foretell_size(
    plan: Plan, objects: Sequence[EncodedObject], rows: Sequence[IndexRow], fitted: Mapping[str, bytes]
) -> DatasetBytes:
    """Of a dataset to come, by the objects of a shard that has just these rows; `fitted`: files of codecs by digest."""
    empty, num = SHARD_FORMATS[plan.recipe.shard.format].empty_bytes, len(rows)
    shard = plan.recipe.shard.model_copy(update={"samples": num})
    of_rows = sum(encoded.size_bytes for encoded in objects) - empty(plan.recipe.model_copy(update={"shard": shard}))
    once = _RECORDS_BYTES + sum(map(len, (*fitted.values(), *zarr_metadata(plan, HeldFitted(fitted)).values())))
    of_shard = _ENTRY_BYTES + _OBJECT_BYTES * len(objects)
    return DatasetBytes(
        objects=of_rows / num * plan.num_rows + plan.num_shards * empty(plan.recipe),
        files=_tables_bytes(plan, objects, rows) / num * plan.num_rows + plan.num_shards * of_shard + once,
    )


def _tables_bytes(plan: Plan, objects: Sequence[EncodedObject], rows: Sequence[IndexRow]) -> int:
    """Of entry and tables of some rows."""
    digest = blake3_hex(b"")
    stored = [
        ObjectEntry(
            name=encoded.name,
            size_bytes=encoded.size_bytes,
            blake3=digest,
            identity=_IDENTITY,
            arrays=encoded.arrays,
        )
        for encoded in objects
    ]
    entry = ShardEntry(
        format=plan.format, shard=0, plan_blake3=digest, epoch=1, objects=tuple(stored), rows=tuple(rows)
    )
    keys = tuple(row.key for row in rows)
    listing = encode_listing(Listing(keys, keys, tuple(row.label for row in rows)))
    tables = [encode_table(table) for table in (shards_table([entry]), index_table([entry]))]
    return sum(map(len, (dump_record(entry), listing, *tables)))
