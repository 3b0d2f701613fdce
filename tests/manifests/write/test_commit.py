from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
from blake3 import blake3

from dtpipe.manifests.canonical import canonical_json, dump_record
from dtpipe.manifests.errors import IncompleteError, LockHeldError, ManifestError, MissingObjectError
from dtpipe.manifests.layout.tables import INDEX_SCHEMA, decode_rows, decode_table
from dtpipe.manifests.schema import LevelSpec, ShardRecipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import (
    commit_entry,
    commit_name,
    load_entries,
    load_manifest,
    merge,
    pending_shards,
    reject_entry,
)
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import plan_digest, start_plan
from parts import toy
from parts.damage import flipped


@pytest.fixture
def begun(tmp_path):
    """A store with a lock, a plan, a listing and shards 0 and 1 of 4 committed."""
    store = Store(tmp_path / "features")
    with Lock.acquire(store) as lock:
        plan, listing = start_plan(store, toy.make_recipe(), toy.make_listing, {})
        for shard_idx in (0, 1):
            commit_entry(store, toy.write_shard(store, plan, listing, shard_idx, lock.epoch), lock.epoch)
        yield store, lock, plan, listing


def test_extract_and_merge_on_each_store(store_url, unbroken):
    manifest, written = toy.extract(store_url)
    store = Store(store_url)
    assert written == [0, 1, 2, 3]
    assert manifest.digest == unbroken[0]
    assert load_manifest(store) == manifest
    assert (manifest.totals.num_rows, manifest.totals.num_ok, manifest.totals.num_bad, manifest.totals.num_shards) == (
        14,
        13,
        1,
        4,
    )
    assert manifest.totals.size_bytes == sum(store.size(name) for name in store.list("data/"))
    assert set(manifest.files) == {"plan.json", "listing.parquet", "shards.parquet", "index.parquet"}
    for name, entry in manifest.files.items():
        assert (entry.size_bytes, entry.blake3) == (store.size(name), blake3(store.read(name)).hexdigest())


def test_the_digest_is_the_documented_one(tmp_path):
    manifest, _ = toy.extract(tmp_path)
    objects = [
        {
            "name": path.relative_to(tmp_path).as_posix(),
            "size": path.stat().st_size,
            "blake3": blake3(path.read_bytes()).hexdigest(),
        }
        for path in sorted((tmp_path / "data").iterdir())
    ]
    document = {"format": "dtpipe-features/1", "keys": list(toy.make_listing().keys), "objects": objects}
    document["recipe"] = toy.make_recipe().model_dump(mode="json")
    assert manifest.digest == blake3(canonical_json(document)).hexdigest()


def test_merged_tables_hold_the_entries(tmp_path):
    toy.extract(tmp_path)
    store = Store(tmp_path)
    plan, listing = start_plan(store, toy.make_recipe(), toy.make_listing, {})
    entries = list(load_entries(store, plan, plan_digest(store)))
    index = decode_rows(store.read("index.parquet"), INDEX_SCHEMA, "index")
    assert index.to_pylist() == [row.model_dump() for entry in entries for row in entry.rows]
    assert index["key"].to_pylist() == list(listing.keys)
    assert index["status"].to_pylist().count("bad: truncated") == 1
    shards = pq.read_table(io.BytesIO(store.read("shards.parquet"))).to_pylist()
    assert shards[0]["arrays"] == [{"name": "l2", "offset": [0, 10], "size": [10, 20], "crc32c": [1, 2**32 - 1]}]
    columns = ("name", "size_bytes", "blake3")
    assert [(row["shard"], *(row[name] for name in columns)) for row in shards] == [
        (entry.shard, *(getattr(stored, name) for name in columns)) for entry in entries for stored in entry.objects
    ]


def test_damaged_tables_are_errors_that_name_the_file(tmp_path):
    toy.extract(tmp_path)
    shards, index = (tmp_path / "shards.parquet").read_bytes(), (tmp_path / "index.parquet").read_bytes()
    with pytest.raises(ManifestError, match="here has columns"):
        decode_rows(shards, INDEX_SCHEMA, "here")
    for place in range(
        0, len(index), 11
    ):  # without the digest: an error or the very same rows, never a crash of another kind
        try:
            decode_table(flipped(index, place, 0x10), pq.read_schema(io.BytesIO(index)), "here")
        except ManifestError as err:
            assert "here" in str(err)


def test_zarr_datasets_need_their_metadata(tmp_path):
    level = LevelSpec(name="l2", stride=4, channels=2, height=8, width=8, tap="x")
    recipe = toy.make_recipe(shard=ShardRecipe(samples=4, format="zarr"), levels=(level,))
    with pytest.raises(MissingObjectError, match=r"data\.zarr/zarr\.json"):
        toy.extract(tmp_path, recipe)
    names = ["data.zarr/zarr.json", "data.zarr/image/zarr.json", "data.zarr/l2/zarr.json"]
    for name in names:
        Store(tmp_path).write(name, b"{}")
    manifest, written = toy.extract(tmp_path, recipe)
    assert written == []
    assert set(names) < set(manifest.files)


def test_pending_is_plan_minus_commits(begun):
    store, _, plan, _ = begun
    assert pending_shards(store, plan) == [2, 3]
    store.write("commits/00009.json", b"of no shard")
    store.write("commits/notes.txt", b"")
    assert pending_shards(store, plan) == [2, 3]


def test_an_unfinished_dataset_does_not_merge(begun):
    store, lock, plan, _ = begun
    with pytest.raises(IncompleteError, match=r"2 of 4 shards not written yet \(2, 3\)"):
        merge(store, plan, lock, {})
    assert not store.exists("manifest.json")
    assert [entry.shard for entry in load_entries(store, plan, plan_digest(store), partial=True)] == [0, 1]


def test_a_second_commit_of_equal_content_is_fine_and_of_other_content_is_not(begun):
    store, lock, plan, listing = begun
    before = store.read(commit_name(1))
    commit_entry(store, toy.write_shard(store, plan, listing, 1, lock.epoch), lock.epoch)
    with pytest.raises(IncompleteError, match="shard 1 committed other content"):
        commit_entry(store, toy.write_shard(store, plan, listing, 1, lock.epoch, salt=b"other"), lock.epoch)
    assert store.read(commit_name(1)) == before


def test_a_commit_of_an_old_epoch_is_refused(begun):
    store, lock, plan, listing = begun
    entry = toy.write_shard(store, plan, listing, 2, lock.epoch)
    with pytest.raises(ManifestError, match="epoch"):
        commit_entry(store, entry, lock.epoch + 1)
    store.write(f"lock/{lock.epoch + 1:05d}.json", b"a later writer")
    with pytest.raises(LockHeldError):
        commit_entry(store, entry, lock.epoch)
    with pytest.raises(LockHeldError):
        merge(store, plan, lock, {})
    assert pending_shards(store, plan) == [2, 3]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shard": 0}, "is the entry of shard 0"),
        ({"plan_blake3": "f" * 64}, "belongs to another plan"),
        ({"rows": ()}, "does not hold rows 4 to 7"),
    ],
)
def test_entries_that_contradict_are_named(begun, change, problem):
    store, _, plan, _ = begun
    entry = list(load_entries(store, plan, plan_digest(store), partial=True))[1]
    store.write(commit_name(1), dump_record(entry.model_copy(update=change)))
    with pytest.raises(ManifestError, match=rf"commits/00001\.json {problem}"):
        list(load_entries(store, plan, plan_digest(store), partial=True))


def test_a_flipped_byte_in_an_entry_names_it(begun):
    store, _, plan, _ = begun
    whole = store.read(commit_name(0))
    for place in range(0, len(whole), 13):
        (store.local / commit_name(0)).write_bytes(flipped(whole, place))
        with pytest.raises(ManifestError, match=r"commits/00000\.json"):
            list(load_entries(store, plan, plan_digest(store), partial=True))


def test_keys_that_are_not_the_listing_are_refused(begun):
    store, lock, plan, listing = begun
    for shard_idx in (2, 3):
        entry = toy.write_shard(store, plan, listing, shard_idx, lock.epoch)
        rows = tuple(row.model_copy(update={"key": "swapped"}) if row.row == 13 else row for row in entry.rows)
        commit_entry(store, entry.model_copy(update={"rows": rows}), lock.epoch)
    with pytest.raises(ManifestError, match=r"00003\.json: row 13 is 'swapped'"):
        merge(store, plan, lock, {})


def damage_rewritten(store, name):
    store.write(name, b"zombie" + store.read(name)[6:])


def damage_truncated(store, name):
    store.write(name, store.read(name)[:-1])


def damage_deleted(store, name):
    (store.local / name).unlink()


def damage_swapped(store, name):
    store.rename(name, "data/aside")
    store.rename("data/00001-1.bin", name)
    store.rename("data/aside", "data/00001-1.bin")


@pytest.mark.parametrize("damage", [damage_rewritten, damage_truncated, damage_deleted, damage_swapped])
def test_objects_changed_after_their_commit_are_sent_back_and_mended(tmp_path, unbroken, damage):
    toy.extract(tmp_path)
    store = Store(tmp_path)
    damage(store, "data/00001-0.bin")
    with pytest.raises(IncompleteError, match=r"objects of 1 shard .* \(1\)"):
        toy.extract(tmp_path)
    assert store.exists("commits/00001.json.rejected")
    manifest, written = toy.extract(tmp_path)
    assert (manifest.digest, written) == (unbroken[0], [1])
    assert {name: data for name, data in toy.content_of(tmp_path).items() if name != "data/aside"} == unbroken[1]


def test_objects_written_again_with_equal_bytes_are_not_redone(tmp_path, unbroken):
    toy.extract(tmp_path)
    for path in sorted((tmp_path / "data").iterdir()):
        before = Store(tmp_path).identity(f"data/{path.name}")
        copy = path.with_suffix(".copy")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
        assert Store(tmp_path).identity(f"data/{path.name}") != before
    manifest, written = toy.extract(tmp_path)
    assert (manifest.digest, written) == (unbroken[0], [])


def test_a_late_write_over_s3_is_noticed_by_its_etag(s3_url, unbroken):
    toy.extract(s3_url)
    damage_rewritten(Store(s3_url), "data/00002-1.bin")
    with pytest.raises(IncompleteError, match=r"\(2\)"):
        toy.extract(s3_url)
    manifest, written = toy.extract(s3_url)
    assert (manifest.digest, written) == (unbroken[0], [2])


def test_rejected_entries_are_all_kept(begun):
    store, lock, plan, listing = begun
    names = []
    for _ in range(3):
        names.append(reject_entry(store, 1))
        assert pending_shards(store, plan) == [1, 2, 3]
        commit_entry(store, toy.write_shard(store, plan, listing, 1, lock.epoch), lock.epoch)
    assert names == ["commits/00001.json.rejected", "commits/00001.json.rejected.1", "commits/00001.json.rejected.2"]
    assert set(names) < set(store.list())


def test_merging_again_changes_nothing_but_times(tmp_path):
    first, _ = toy.extract(tmp_path)
    before = toy.content_of(tmp_path)
    second, written = toy.extract(tmp_path)
    assert written == []
    assert second.model_copy(update={"provenance": {}}) == first.model_copy(update={"provenance": {}})
    assert toy.content_of(tmp_path) == before


def test_a_zombie_that_writes_other_bytes_between_commit_and_merge_is_noticed(begun, unbroken):
    store, lock, plan, listing = begun
    for shard_idx in (2, 3):
        commit_entry(store, toy.write_shard(store, plan, listing, shard_idx, lock.epoch), lock.epoch)
    toy.write_shard(store, plan, listing, 2, epoch=0, salt=b"zombie")  # same sizes, after the successor's commit
    with pytest.raises(IncompleteError, match=r"\(2\)"):
        merge(store, plan, lock, {})
    assert pending_shards(store, plan) == [2]
    commit_entry(store, toy.write_shard(store, plan, listing, 2, lock.epoch), lock.epoch)
    assert merge(store, plan, lock, {}).digest == unbroken[0]
    assert toy.content_of(store.local) == unbroken[1]
