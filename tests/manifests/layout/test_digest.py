"""The digest put together from columns is that of the one canonical document which the format specifies."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.layout import digest as digest_module
from dtpipe.manifests.layout.digest import dataset_digest
from parts.datasets import make_recipe

Objects = Sequence[tuple[str, int, str]]
KEYS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=9)
OBJECTS = st.lists(st.tuples(st.text('ab/"\\\x01é0', max_size=4), st.integers(0, 2**53 - 1), st.sampled_from("ab")))


def table(objects: Objects) -> pa.Table:
    names = ("name", "size_bytes", "blake3")
    types = (pa.string(), pa.int64(), pa.string())
    return pa.table([pa.array([stored[idx] for stored in objects], types[idx]) for idx in range(3)], names)


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> None:
    """So that a document has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_module, "_PIECE", 3)
        yield


@given(KEYS, OBJECTS, st.integers(0, 9))
def test_the_digest_is_that_of_the_specified_document(keys: list[str], objects: Objects, cut: int) -> None:
    recipe = make_recipe()
    document = {
        "format": "dtpipe-features/1",
        "recipe": recipe.model_dump(mode="json"),
        "keys": keys,
        "objects": [{"name": name, "size": size, "blake3": each} for name, size, each in sorted(objects)],
    }
    expected = blake3(canonical_json(document)).hexdigest()
    assert dataset_digest(recipe, keys, table(objects)) == expected
    chunks = [pa.array(part, pa.string()) for part in (keys[:cut], keys[cut:])]
    assert dataset_digest(recipe, pa.chunked_array(chunks), table(objects[::-1])) == expected


def test_the_digest_depends_on_each_part() -> None:
    recipe, keys, objects = make_recipe(), ["a", "b"], [("data/0", 3, "a" * 64), ("data/1", 4, "b" * 64)]
    others = [
        dataset_digest(make_recipe(noise_seed=1), keys, table(objects)),
        dataset_digest(recipe, keys[::-1], table(objects)),
        dataset_digest(recipe, keys, table(objects[:1])),
        dataset_digest(recipe, keys, table([objects[0], ("data/1", 5, "b" * 64)])),
        dataset_digest(recipe, keys, table([objects[0], ("data/2", 4, "b" * 64)])),
        dataset_digest(recipe, keys, table([objects[0], ("data/1", 4, "c" * 64)])),
    ]
    assert len({dataset_digest(recipe, keys, table(objects)), *others}) == 7
