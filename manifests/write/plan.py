"""The plan: a recipe and fixed rows, written before any work and never changed.

One rule: plan.json is created put-if-absent after listing.parquet, so that whoever sees a plan sees its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtpipe.manifests.canonical import blake3_hex, canonical_json, dump_record, load_record
from dtpipe.manifests.codecs.fitted import is_fitted_name
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.differences import Difference, refuse_differences
from dtpipe.manifests.errors import ConfigError, ManifestError, MissingObjectError, PlanChangedError
from dtpipe.manifests.layout.tables import LISTING_FILE
from dtpipe.manifests.schema import LevelSpec, Plan, Recipe
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.outputs import refuse_no_folder
from dtpipe.manifests.store.store import LOCK_FOLDER, Store
from dtpipe.manifests.words import are, count_of
from dtpipe.manifests.write.listing import Listing, encode_listing, read_listing, write_listing
from dtpipe.manifests.write.settings import settings_that_differ

PLAN_FILE = "plan.json"
SELECTION, SOURCE_SEEN = "selection", "source"  # keys of a plan's provenance
TARGET_SHARD_BYTES = 256 * 2**20
MIN_SHARD_SAMPLES, MAX_SHARD_SAMPLES = 16, 4096


def start_plan(
    store: Store,
    recipe: Recipe,
    listing: Listing | Callable[[], Listing],
    provenance: Mapping[str, Any],
    fresh: bool = False,
    selection: Mapping[str, Any] | None = None,
) -> tuple[Plan, Listing]:
    """Begin a dataset, or go on with the one that is there. The caller holds the lock.

    A `listing` that is a function is called only to begin, so that resume never lists the source again. `selection` is
    what chose the rows but is no content (`--limit`, digest of `--keys`): kept in the plan and compared on resume.
    Returns the stored plan and rows.
    Raises: PlanChangedError naming what differs when the output holds another recipe, selection or (where it is a value
    and there is no selection) listing; ConfigError for `fresh` where output exists, or a folder with foreign files.
    """
    plan = find_plan(store, fresh)
    if plan is None:
        rows = listing() if callable(listing) else listing
        plan = _new_plan(recipe, rows, write_listing(store, rows), {**provenance, SELECTION: dict(selection or {})})
        fault_point("plan.listing")
        data = dump_record(plan)
        if store.create(PLAN_FILE, data) or store.read(PLAN_FILE) == data:
            fault_point("plan.created")
            return plan, rows
        plan = load_plan(store)
    _refuse_changes(store, plan, recipe, selection)
    return plan, _stored_listing(store, plan, listing, selection)


def find_plan(store: Store, fresh: bool = False) -> Plan | None:
    """The plan of the dataset that is there, or None where one can begin. Writes nothing.

    Raises: ConfigError for `fresh` where a dataset is, or other files are; ManifestError for a damaged plan.
    """
    if not store.exists(PLAN_FILE):
        if store.local is not None:
            refuse_no_folder(store.local)
        _refuse_foreign(store)
        return None
    if fresh:
        raise ConfigError(
            f"{store.url} holds a dataset and --fresh was given; choose another --out, or leave --fresh out to go on"
        )
    return load_plan(store)


def load_plan(store: Store) -> Plan:
    """Read plan.json.

    Raises: MissingObjectError, or ManifestError when it was changed or contradicts itself.
    """
    return parse_plan(store.read(PLAN_FILE), store.where(PLAN_FILE))


def parse_plan(data: bytes, where: str) -> Plan:
    """As `load_plan`, from the bytes of plan.json. Raises: ManifestError naming `where`."""
    plan = load_record(Plan, data, where)
    if plan.num_shards != math.ceil(plan.num_rows / plan.recipe.shard.samples):
        raise ManifestError(
            f"{where}: {count_of(plan.num_rows, 'row')} {are(plan.num_rows)} not {count_of(plan.num_shards, 'shard')}; "
            "the dataset cannot be read"
        )
    return plan


def plan_digest(store: Store) -> str:
    """blake3 of plan.json's bytes, which every entry carries."""
    return blake3_hex(store.read(PLAN_FILE))


def plan_of(recipe: Recipe, num_rows: int) -> Plan:
    """A plan that is never written."""
    num_shards = math.ceil(num_rows / recipe.shard.samples)
    return Plan(
        format=recipe.format, recipe=recipe, num_rows=num_rows, num_shards=num_shards, listing_blake3=blake3_hex(b"")
    )


def bytes_per_sample(levels: Sequence[LevelSpec], num_views: int, image_px: tuple[int, int] | None) -> int:
    """Bytes of one sample before compression: all levels of all views as coded, and the uint8 RGB image if stored."""
    parts = [spec for level in levels for spec in open_codec(level).parts.values()]
    view_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in parts)
    return view_bytes * num_views + (3 * image_px[0] * image_px[1] if image_px else 0)


def shard_samples_for(sample_bytes: int) -> int:
    """Rows per shard: the power of two in 16..4096 that comes nearest to 256 MiB, by ratio."""
    power = round(math.log2(TARGET_SHARD_BYTES / max(sample_bytes, 1)))
    return max(MIN_SHARD_SAMPLES, min(MAX_SHARD_SAMPLES, 1 << max(power, 0)))


def _new_plan(recipe: Recipe, listing: Listing, listing_blake3: str, provenance: dict[str, Any]) -> Plan:
    num_shards = math.ceil(len(listing) / recipe.shard.samples)
    canonical_json(provenance)  # say now, not after the work, that it cannot be stored
    return Plan(
        format=recipe.format,
        recipe=recipe,
        num_rows=len(listing),
        num_shards=num_shards,
        listing_blake3=listing_blake3,
        provenance=provenance,
    )


def _refuse_foreign(store: Store) -> None:
    """A folder without a plan may hold only what a start that was killed leaves."""
    foreign = [name for name in store.list() if not _is_of_a_start(name)]
    if foreign:
        shown = ", ".join(foreign[:3])
        raise ConfigError(
            f"{store.url} is not empty and holds no {PLAN_FILE} ({count_of(len(foreign), 'object')}: {shown}); "
            "choose an empty place for --out, or restore plan.json if this is a feature dataset"
        )


def _is_of_a_start(name: str) -> bool:
    return name == LISTING_FILE or name.startswith(LOCK_FOLDER) or is_fitted_name(name)


def _refuse_changes(store: Store, plan: Plan, recipe: Recipe, selection: Mapping[str, Any] | None) -> None:
    changes = settings_that_differ(plan.recipe, recipe, plan.provenance.get(SELECTION, {}), selection)
    remedy = "set them back, or choose another --out"
    if _is_lower_batch(changes):
        lower_to = changes[0].wanted
        remedy = f"to make the shards that are left in smaller batches set it back and give --lower-batch-to {lower_to}"
    refuse_differences(f"{store.url} holds a dataset of another recipe", changes, remedy)


def _is_lower_batch(changes: Sequence[Difference]) -> bool:
    """Whether a smaller batch is all that was asked for."""
    return [change.name for change in changes] == ["compute.batch_size"] and changes[0].wanted < changes[0].stored


def _stored_listing(
    store: Store, plan: Plan, listing: Listing | Callable[[], Listing], selection: Mapping[str, Any] | None
) -> Listing:
    try:
        stored = read_listing(store, plan.listing_blake3)
    except (MissingObjectError, ManifestError):
        again = listing() if callable(listing) else listing
        if blake3_hex(encode_listing(again)) != plan.listing_blake3:
            raise
        write_listing(store, again)  # lost or damaged, and the source still gives the very same rows
        return again
    if selection is None and not callable(listing) and (listing.keys, listing.labels) != (stored.keys, stored.labels):
        raise PlanChangedError(
            f"{store.url} holds a dataset of other rows ({len(stored)} stored, {len(listing)} wanted, first difference "
            f"at {_first_difference(stored, listing)}); choose another --out, or extract the same samples to go on"
        )
    return stored


def _first_difference(stored: Listing, wanted: Listing) -> str:
    for one, other in zip(stored, wanted, strict=False):
        if (one.key, one.label) != (other.key, other.label):
            return f"row {one.row}: stored {one.key!r}, wanted {other.key!r}"
    return f"row {min(len(stored), len(wanted))}"
