"""Zarr shards: bytes that follow from content, an index and metadata as zarr-python itself writes them."""

from __future__ import annotations

import json

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from dtpipe.manifests.codecs.base import LEVEL_AXES
from dtpipe.manifests.errors import DamagedDataError, ShapeError
from dtpipe.manifests.layout.arrays import ArraySpec, ShardArrays, stored_arrays
from dtpipe.manifests.layout.zarr import (
    TRAILER_BYTES,
    decode_zarr_chunk,
    shard_object_name,
    zarr_metadata,
)
from dtpipe.manifests.schema import IndexRow, Plan
from dtpipe.manifests.write.shard import encode_shard
from parts import golden
from parts.bits import any_bits, assert_same_bits


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Five rows in shards of two."""
    recipe = golden.make_recipe(golden.Settings())
    return Plan(recipe=recipe, num_rows=5, num_shards=3, listing_blake3="0" * 64)


def zarr_python_twin(plan: Plan, name: str) -> tuple[MemoryStore, zarr.Array]:
    """The same array as zarr-python makes it."""
    spec, store = stored_arrays(plan.recipe)[name], MemoryStore()
    array = zarr.create_array(
        store,
        shape=spec.shape(plan.num_rows),
        chunks=(*[1] * (len(spec.shape(1)) - len(spec.chunk_shape)), *spec.chunk_shape),
        shards=spec.shape(plan.recipe.shard.samples),
        dtype=spec.dtype.name,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        serializer=BytesCodec(endian="little"),
        filters=None,
        fill_value=0,
        dimension_names=["row", "y", "x", "rgb"] if name == "image" else ["row", "view", "channel", "y", "x"],
        config={"write_empty_chunks": True},
    )
    return store, array


@pytest.mark.parametrize("name", ["image", "l2", "l4.b"])
def test_metadata_is_what_zarr_python_writes(plan: Plan, name: str) -> None:
    ours = json.loads(zarr_metadata(plan)[f"data.zarr/{name}/zarr.json"])
    theirs = json.loads(zarr_python_twin(plan, name)[0]._store_dict["zarr.json"].to_bytes())
    assert ours == theirs


def test_last_shard_is_what_zarr_python_reads_and_its_index_marks_rows_beyond(plan: Plan) -> None:
    settings = golden.Settings()
    listing = golden.make_listing(settings)
    given_arrays = golden.shard_arrays(plan, listing, 2, settings)
    (encoded,) = [each for each in encode_shard(plan, 2, given_arrays) if "l2" in each.arrays]
    assert encoded.name == "data.zarr/l2/c/2/0/0/0/0"
    index = np.frombuffer(encoded.data[-(4 * 16 + 4) : -4], "<u8").reshape(4, 2)
    assert (index[2:] == 2**64 - 1).all()
    assert google_crc32c.value(index.tobytes()) == int.from_bytes(encoded.data[-4:], "little")
    store, array = zarr_python_twin(plan, "l2")
    store._store_dict["c/2/0/0/0/0"] = zarr.core.buffer.cpu.Buffer.from_bytes(encoded.data)
    np.testing.assert_array_equal(array[4:5], given_arrays.arrays["l2"])


def test_entry_tells_chunk_and_its_checksum_apart(plan: Plan) -> None:
    """A checksum over data and its own crc32c would be the same constant for every chunk, and find no swap."""
    settings = golden.Settings()
    for encoded in encode_shard(plan, 0, golden.shard_arrays(plan, golden.make_listing(settings), 0, settings)):
        ((_, members),) = encoded.arrays.items()
        assert len(set(members.crc32c)) == len(members.crc32c)
        for offset, size, checksum in zip(members.offset, members.size, members.crc32c, strict=True):
            chunk = encoded.data[offset : offset + size]
            assert google_crc32c.value(chunk) == checksum
            assert encoded.data[offset + size : offset + size + TRAILER_BYTES] == checksum.to_bytes(4, "little")


@settings(max_examples=30)
@given(
    image=any_bits(np.uint8, (2, 4, 6, 3)),
    l2=any_bits(np.float16, (2, 2, 3, 2, 2)),
    l4=any_bits(np.float32, (2, 2, 5, 1, 2)),
)
def test_round_trip(plan: Plan, image: np.ndarray, l2: np.ndarray, l4: np.ndarray) -> None:
    rows = [IndexRow(row=row, key=str(row), shard=0) for row in range(2)]
    shard = ShardArrays({"image": image, "l2": l2, "l3": l2[::-1], "l4.b": l4}, rows)
    specs = stored_arrays(plan.recipe)
    first, again = list(encode_shard(plan, 0, shard)), list(encode_shard(plan, 0, shard))
    assert first == again
    for encoded in first:
        ((name, members),) = encoded.arrays.items()
        chunks = shard.arrays[name].reshape(-1, *specs[name].chunk_shape)
        for truth, offset, size in zip(chunks, members.offset, members.size, strict=True):
            out = np.empty(specs[name].chunk_shape, specs[name].dtype)
            end = offset + size
            decode_zarr_chunk(specs[name], encoded.data[offset:end], encoded.data[end : end + TRAILER_BYTES], out)
            assert_same_bits(out, truth)


def test_arrays_that_are_not_the_plans_are_refused(plan: Plan) -> None:
    settings = golden.Settings()
    good = golden.shard_arrays(plan, golden.make_listing(settings), 0, settings)
    bad = [
        ShardArrays({name: values for name, values in good.arrays.items() if name != "image"}, good.rows),
        ShardArrays({**good.arrays, "l2": good.arrays["l2"].astype(np.float32)}, good.rows),
        ShardArrays({**good.arrays, "l2": good.arrays["l2"][:1]}, good.rows),
        ShardArrays(good.arrays, good.rows[::-1]),
    ]
    for arrays_ in bad:
        with pytest.raises(ShapeError, match="shard 0"):
            list(encode_shard(plan, 0, arrays_))


def test_chunks_of_wrong_content_are_refused() -> None:
    spec, out = ArraySpec("l2", np.dtype("<f2"), 1, (1, 2, 2), LEVEL_AXES), np.empty((1, 2, 2), np.float16)
    with pytest.raises(DamagedDataError, match="stored checksum"):
        decode_zarr_chunk(spec, b"abc", b"0000", out)
    trailer = google_crc32c.value(b"abc").to_bytes(4, "little")
    with pytest.raises(DamagedDataError, match="no zstd frame"):
        decode_zarr_chunk(spec, b"abc", trailer, out)
    assert shard_object_name(spec, 7) == "data.zarr/l2/c/7/0/0/0/0"
