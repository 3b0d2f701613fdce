from __future__ import annotations

import json

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict

from dtpipe.manifests.canonical import blake3_hex, canonical_json, dump_record, load_record, seal, unseal
from dtpipe.manifests.errors import ManifestError
from dtpipe.manifests.schema import FileEntry, StrictModel

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
names = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "checksum")
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=20
)
documents = st.dictionaries(names, values, max_size=5)


def test_canonical_json_is_sorted_compact_utf8():
    assert canonical_json({"b": [1, 2.5, None], "a": "é", "A": True}) == '{"A":true,"a":"é","b":[1,2.5,null]}'.encode()


@given(value=values)
def test_canonical_json_keeps_the_value(value):
    assert json.loads(canonical_json(value)) == value


@given(document=documents)
def test_canonical_json_ignores_the_order_of_keys(document):
    assert canonical_json(dict(reversed(document.items()))) == canonical_json(document)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {1: "a"}, {"a": [{2: 1}]}, "\ud800", {"a": object()}])
def test_canonical_json_refuses_what_json_cannot_hold(value):
    with pytest.raises(ManifestError):
        canonical_json(value)


def test_blake3_hex_equals_the_library():
    assert (
        blake3_hex(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )  # BLAKE3 test vector, length 0
    assert blake3_hex(b"abc") == blake3(b"abc").hexdigest()


@given(document=documents)
def test_seal_round_trip(document):
    data = seal(document)
    assert unseal(data, "here") == document
    plain = json.loads(data)
    assert list(plain)[-1] == "checksum"
    assert plain == {**document, "checksum": blake3(canonical_json(document)).hexdigest()}


@given(document=documents, data=st.data())
def test_any_changed_byte_is_an_error_that_names_the_file(document, data):
    sealed = bytearray(seal(document))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ManifestError, match=r"here/plan\.json"):
        unseal(bytes(sealed), "here/plan.json")


def test_every_byte_of_one_document_flipped_in_every_bit():
    sealed = seal(
        {"rows": [{"row": 1, "key": "ä"}, {"row": 2, "key": "b"}], "nested": {"empty": [], "none": {}}, "share": 0.25}
    )
    for place in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[place] ^= 1 << bit
            with pytest.raises(ManifestError, match="file"):
                unseal(bytes(damaged), "file")


@given(document=documents, data=st.data())
def test_truncation_and_trailing_bytes_are_errors(document, data):
    sealed = seal(document)
    with pytest.raises(ManifestError):
        unseal(sealed[: data.draw(st.integers(0, len(sealed) - 1))], "here")
    with pytest.raises(ManifestError):
        unseal(sealed + b"\n", "here")


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":NaN}', b"[1]", b"{}", b'{"a":1}', b'{"checksum":1}']
)
def test_what_is_no_sealed_document_is_an_error(data):
    with pytest.raises(ManifestError, match="somewhere"):
        unseal(data, "somewhere")


def test_a_document_with_one_key_twice_is_an_error():
    sealed = seal({"a": 1}).replace(b' "a": 1,', b' "a": 2,\n "a": 1,')
    with pytest.raises(ManifestError):
        unseal(sealed, "here")


def test_flat_lists_stay_on_one_line():
    lines = seal({"offset": list(range(100)), "rows": [{"row": 0}, {"row": 1}]}).decode().splitlines()
    assert len(lines) == 8


def test_record_round_trip_and_wrong_kind():
    record = FileEntry(size_bytes=3, blake3="a" * 64)
    assert load_record(FileEntry, dump_record(record), "here") == record
    with pytest.raises(ManifestError, match=r"here is no FileEntry: size_bytes"):
        load_record(FileEntry, seal({"size_bytes": -1, "blake3": "a" * 64}), "here")


def test_another_format_says_which_version_is_needed():
    class Versioned(StrictModel):
        model_config = ConfigDict(extra="allow")

    with pytest.raises(ManifestError, match="dtpipe-features/9"):
        load_record(Versioned, seal({"format": "dtpipe-features/9"}), "here")
