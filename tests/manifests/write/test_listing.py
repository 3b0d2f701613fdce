from __future__ import annotations

import dataclasses
import io
import unicodedata

import numpy as np
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dtpipe.manifests.errors import InputError, ManifestError, MissingObjectError
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import build_listing, encode_listing, permutation, read_listing, write_listing
from parts.damage import flipped

# frozen when the format was made: another numpy or machine must give the same rows
GOLDEN_SEED_0 = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
GOLDEN_SEED_12345 = [6, 5, 7, 8, 0, 2, 3, 1, 4, 9]


@dataclasses.dataclass(frozen=True)
class Item:
    key: str
    uri: str = ""
    label: str | None = None


def items(*keys):
    return [Item(key, f"file:///{key}", key[:1]) for key in keys]


key_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
key_lists = st.lists(key_text, min_size=1, max_size=20, unique_by=lambda key: unicodedata.normalize("NFC", key))


@given(keys=key_lists, seed=st.integers(0, 2**63), data=st.data())
def test_rows_do_not_depend_on_the_order_of_listing(keys, seed, data):
    shuffled = data.draw(st.permutations(keys))
    listing = build_listing(items(*keys), seed=seed)
    assert build_listing(items(*shuffled), seed=seed) == listing
    assert sorted(listing.keys) == sorted(unicodedata.normalize("NFC", key) for key in keys)


@given(keys=key_lists, limit=st.integers(1, 25))
def test_a_limit_takes_the_first_rows(keys, limit):
    assert build_listing(items(*keys), limit=limit).keys == build_listing(items(*keys)).keys[:limit]


@given(keys=key_lists)
def test_container_order_is_kept(keys):
    assert build_listing(items(*keys), order="container").uris == tuple(f"file:///{key}" for key in keys)


def test_columns_stay_together():
    listing = build_listing([Item("b", "uri b", "B"), Item("a", "uri a", None), Item("c", "uri c", "C")])
    assert {(row.key, row.uri, row.label) for row in listing} == {
        ("a", "uri a", None),
        ("b", "uri b", "B"),
        ("c", "uri c", "C"),
    }
    assert [row.row for row in listing.rows(range(1, 3))] == [1, 2]


def test_golden_permutation():
    assert permutation(10, 0) == GOLDEN_SEED_0
    assert permutation(10, 12345) == GOLDEN_SEED_12345


@given(count=st.integers(0, 50), seed=st.integers(0, 2**64))
def test_permutation_sorts_philox_words(count, seed):
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count).tolist()
    assert permutation(count, seed) == sorted(range(count), key=words.__getitem__)


def test_permutations_mix_classes():
    listing = build_listing(items(*(f"{label}/{idx:03d}" for label in "abcd" for idx in range(250))))
    for start in range(0, 1000, 100):  # a class-pure shard would have 100 of one label; 25 expected, sd 4
        assert max(listing.labels[start : start + 100].count(label) for label in "abcd") < 50


def test_keys_are_nfc():
    assert build_listing(items("e\u0301.jpg")).keys == ("\u00e9.jpg",)


@pytest.mark.parametrize("keys", [("a.jpg", "b.jpg", "a.jpg"), ("\u00e9.jpg", "e\u0301.jpg")])
def test_duplicate_keys_are_named_with_both_uris(keys):
    with pytest.raises(InputError, match="two samples have the key") as err:
        build_listing(items(*keys))
    assert f"file:///{keys[0]}" in str(err.value)
    assert f"file:///{keys[-1]}" in str(err.value)


@pytest.mark.parametrize("key", ["", "a\nb", "a\0b", "bad\udcff.jpg"])
def test_unusable_keys_are_refused(key):
    with pytest.raises(InputError):
        build_listing([Item(key, "where it lies")])


def test_no_samples_is_an_error():
    with pytest.raises(InputError, match="no samples"):
        build_listing([])


def test_wanted_keys_are_taken_and_lost_ones_named():
    assert sorted(build_listing(items("a", "b", "\u00e9"), keys=["b", "e\u0301"]).keys) == ["b", "\u00e9"]
    with pytest.raises(InputError, match=r"1 of 2 wanted keys.*'x'"):
        build_listing(items("a", "b"), keys=["a", "x"])


@given(keys=key_lists)
def test_bytes_are_a_function_of_the_rows(keys):
    listing = build_listing(items(*keys))
    again = build_listing(items(*reversed(keys)))
    assert encode_listing(listing) == encode_listing(again)
    table = pq.read_table(io.BytesIO(encode_listing(listing)))
    columns = {"key": list(listing.keys), "uri": list(listing.uris), "label": list(listing.labels)}
    assert table.to_pydict() == {"row": list(range(len(keys))), **columns}


def test_store_round_trip(store_url):
    store, listing = Store(store_url), build_listing([Item("b", "u", None), Item("a", "v", "L")])
    digest = write_listing(store, listing)
    assert digest == blake3(store.read("listing.parquet")).hexdigest()
    assert read_listing(store, digest) == listing


def test_every_flipped_byte_is_an_error_that_names_the_file(tmp_path):
    store = Store(tmp_path)
    digest = write_listing(store, build_listing(items("a", "b", "c")))
    whole = store.read("listing.parquet")
    for place in range(0, len(whole), 17):
        (tmp_path / "listing.parquet").write_bytes(flipped(whole, place))
        with pytest.raises(ManifestError, match=r"listing\.parquet"):
            read_listing(store, digest)


def test_a_lost_listing_is_named(tmp_path):
    with pytest.raises(MissingObjectError, match=r"listing\.parquet"):
        read_listing(Store(tmp_path), "0" * 64)
