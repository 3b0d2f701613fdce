from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtpipe.manifests.errors import ConfigError, ManifestError, MissingObjectError, PlanChangedError
from dtpipe.manifests.schema import ComputeRecipe, LevelSpec, ViewSpec
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.plan import (
    bytes_per_sample,
    load_plan,
    plan_digest,
    shard_samples_for,
    start_plan,
)
from parts import toy


def test_a_plan_is_begun_once_and_gone_on_with(store_url):
    store = Store(store_url)
    plan, listing = start_plan(store, toy.make_recipe(), toy.make_listing(), {"host": "one"})
    assert store.list() == ["listing.parquet", "plan.json"]
    assert (plan.num_rows, plan.num_shards, plan.shard_rows(3)) == (14, 4, range(12, 14))
    digest = plan_digest(store)
    again, rows = start_plan(store, toy.make_recipe(), toy.make_listing(), {"host": "two"})
    assert (again, rows) == (plan, listing)
    assert plan_digest(store) == digest
    assert load_plan(store) == plan


def test_resume_never_lists_the_source(tmp_path):
    store, calls = Store(tmp_path), []

    def list_source():
        calls.append(1)
        return toy.make_listing()

    for _ in range(3):
        _, listing = start_plan(store, toy.make_recipe(), list_source, {}, selection={"limit": 14})
        assert listing == toy.make_listing()
    assert len(calls) == 1


def test_another_recipe_is_refused_with_both_values(tmp_path):
    store = Store(tmp_path)
    start_plan(store, toy.make_recipe(), toy.make_listing(), {})
    before = store.stats()
    other = toy.make_recipe(
        compute=ComputeRecipe(device="cpu", batch_size=64, threads=1),
        noise_seed=7,
        views=(ViewSpec(draw=0), ViewSpec(draw=1, timestep=9)),
    )
    with pytest.raises(PlanChangedError) as err:
        start_plan(store, other, toy.make_listing(), {})
    for part in (
        "compute.batch_size: 2 -> 64",
        "noise_seed: 0 -> 7",
        "views[1].timestep: null -> 9",
    ):
        assert part in str(err.value)
    assert store.stats() == before


def test_other_rows_are_refused(tmp_path):
    store = Store(tmp_path)
    start_plan(store, toy.make_recipe(), toy.make_listing(14), {})
    with pytest.raises(PlanChangedError, match="14 stored, 13 wanted"):
        start_plan(store, toy.make_recipe(), toy.make_listing(13), {})


def test_another_selection_is_refused_by_name(tmp_path):
    store = Store(tmp_path)
    start_plan(store, toy.make_recipe(), toy.make_listing, {}, selection={"limit": 10, "keys_blake3": None})
    with pytest.raises(PlanChangedError, match="limit: 10 -> 20"):
        start_plan(store, toy.make_recipe(), toy.make_listing, {}, selection={"limit": 20, "keys_blake3": None})


def test_fresh_refuses_when_output_exists(tmp_path):
    store = Store(tmp_path)
    start_plan(store, toy.make_recipe(), toy.make_listing, {}, fresh=True)
    with pytest.raises(ConfigError, match="--fresh"):
        start_plan(store, toy.make_recipe(), toy.make_listing, {}, fresh=True)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        start_plan(Store(tmp_path), toy.make_recipe(), toy.make_listing, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_lost_or_damaged_listing_comes_back_from_an_unchanged_source(tmp_path):
    store = Store(tmp_path)
    _, listing = start_plan(store, toy.make_recipe(), toy.make_listing, {})
    whole = store.read("listing.parquet")
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(whole[:-1])):
        damage(tmp_path / "listing.parquet")
        assert start_plan(store, toy.make_recipe(), toy.make_listing, {})[1] == listing
        assert store.read("listing.parquet") == whole
    (tmp_path / "listing.parquet").unlink()
    with pytest.raises(MissingObjectError, match=r"listing\.parquet"):
        start_plan(store, toy.make_recipe(), lambda: toy.make_listing(9), {})


def test_every_changed_byte_of_the_plan_is_an_error_that_names_it(tmp_path):
    store = Store(tmp_path)
    start_plan(store, toy.make_recipe(), toy.make_listing, {})
    whole = store.read("plan.json")
    for place in range(0, len(whole), 7):
        (tmp_path / "plan.json").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ManifestError, match=r"plan\.json"):
            load_plan(store)


def test_provenance_that_is_no_json_is_refused_before_work(tmp_path):
    with pytest.raises(ManifestError, match="JSON"):
        start_plan(Store(tmp_path), toy.make_recipe(), toy.make_listing, {"when": object()})


def level(**changes):
    return LevelSpec(**{"name": "l2", "stride": 4, "channels": 2, "height": 8, "width": 6, "tap": "x", **changes})


def test_bytes_per_sample_by_hand():
    levels = (level(), level(name="l3", channels=5, height=4, width=3, dtype="float32"))
    assert bytes_per_sample(levels, 3, None) == 3 * (2 * 8 * 6 * 2 + 5 * 4 * 3 * 4)
    assert bytes_per_sample(levels, 3, (32, 24)) == 3 * (2 * 8 * 6 * 2 + 5 * 4 * 3 * 4) + 32 * 24 * 3


@given(sample_bytes=st.integers(0, 10**10))
def test_shards_are_the_power_of_two_nearest_256_mib(sample_bytes):
    found = shard_samples_for(sample_bytes)
    powers = [2**power for power in range(4, 13)]
    assert found in powers
    ratios = {samples: abs(math.log(max(sample_bytes, 1) * samples / 2**28)) for samples in powers}
    assert ratios[found] <= min(ratios.values()) + 1e-9


def test_shard_sizes_by_hand():
    assert [shard_samples_for(size) for size in (1, 2**18, 2**20, 3 * 2**20, 2**40)] == [4096, 1024, 256, 64, 16]
