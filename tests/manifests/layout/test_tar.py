"""Tar shards: members as a plain tar reader sees them, and bytes that follow from content."""

from __future__ import annotations

import io
import json
import tarfile

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from dtpipe.manifests.codecs.base import LEVEL_AXES
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.layout.arrays import ArraySpec, EncodedObject, ShardArrays, stored_arrays
from dtpipe.manifests.layout.tar import decode_tar_chunk
from dtpipe.manifests.schema import IndexRow, Plan
from dtpipe.manifests.write.shard import encode_shard
from parts import golden
from parts.bits import any_bits, assert_same_bits


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Five rows in shards of two."""
    recipe = golden.make_recipe(golden.Settings(format="webdataset"))
    return Plan(recipe=recipe, num_rows=5, num_shards=3, listing_blake3="0" * 64)


def encode(plan: Plan, shard_idx: int) -> tuple[ShardArrays, EncodedObject]:
    """A shard and its tar."""
    shard = golden.shard_arrays(plan, golden.make_listing(golden.Settings()), shard_idx, golden.Settings())
    (encoded,) = encode_shard(plan, shard_idx, shard)
    return shard, encoded


def test_members_are_those_of_the_rows_in_order(plan: Plan) -> None:
    shard, encoded = encode(plan, 1)
    suffixes = ["key.json", "image.png"] + [f"{name}.v{view}.npy" for name in ("l2", "l3", "l4.b") for view in (0, 1)]
    with tarfile.open(fileobj=io.BytesIO(encoded.data)) as tar:
        assert tar.getnames() == [f"{row:08d}.{suffix}" for row in (2, 3) for suffix in suffixes]
        assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in tar)
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    for idx, row in enumerate(shard.rows):
        stem = f"{row.row:08d}"
        assert json.loads(files[f"{stem}.key.json"]) == {
            "row": row.row,
            "key": row.key,
            "label": row.label,
            "ok": row.status == "ok",
        }
        image = np.asarray(Image.open(io.BytesIO(files[f"{stem}.image.png"])))
        np.testing.assert_array_equal(image, shard.arrays["image"][idx])
        for name, values in ((name, values) for name, values in shard.arrays.items() if name != "image"):
            for view in (0, 1):
                np.testing.assert_array_equal(
                    np.load(io.BytesIO(files[f"{stem}.{name}.v{view}.npy"])), values[idx, view]
                )


def test_entry_lists_every_member_by_place_and_checksum(plan: Plan) -> None:
    _, encoded = encode(plan, 0)
    with tarfile.open(fileobj=io.BytesIO(encoded.data)) as tar:
        places = {(member.offset_data, member.size) for member in tar}
    listed = {
        (offset, size)
        for members in encoded.arrays.values()
        for offset, size, checksum in zip(members.offset, members.size, members.crc32c, strict=True)
        if google_crc32c.value(encoded.data[offset : offset + size]) == checksum
    }
    assert listed == places


@settings(max_examples=30)
@given(
    image=any_bits(np.uint8, (1, 4, 6, 3)),
    l2=any_bits(np.float16, (1, 2, 3, 2, 2)),
    l4=any_bits(np.float32, (1, 2, 5, 1, 2)),
)
def test_round_trip(plan: Plan, image: np.ndarray, l2: np.ndarray, l4: np.ndarray) -> None:
    arrays_ = {"image": image, "l2": l2, "l3": l2[::-1], "l4.b": l4}
    shard = ShardArrays(arrays_, [IndexRow(row=4, key="k", shard=2)])
    (encoded,) = encode_shard(plan, 2, shard)
    assert [encoded] == list(encode_shard(plan, 2, shard))
    for name, spec in stored_arrays(plan.recipe).items():
        members = encoded.arrays[name]
        for truth, offset, size in zip(
            shard.arrays[name].reshape(-1, *spec.chunk_shape), members.offset, members.size, strict=True
        ):
            out = np.empty(spec.chunk_shape, spec.dtype)
            decode_tar_chunk(spec, encoded.data[offset : offset + size], b"", out)
            assert_same_bits(out, truth)


def test_members_of_wrong_content_are_refused() -> None:
    level = ArraySpec("l2", np.dtype("<f2"), 1, (1, 2, 2), LEVEL_AXES)
    image = ArraySpec("image", np.dtype("u1"), None, (2, 2, 3), ("y", "x", "rgb"))
    sink = io.BytesIO()
    np.save(sink, np.zeros((1, 2, 2), np.float32))
    with pytest.raises(DamagedDataError, match="float32"):
        decode_tar_chunk(level, sink.getvalue(), b"", np.empty((1, 2, 2), np.float16))
    with pytest.raises(DamagedDataError, match="no npy"):
        decode_tar_chunk(level, b"x", b"", np.empty((1, 2, 2), np.float16))
    with pytest.raises(DamagedDataError, match="no PNG"):
        decode_tar_chunk(image, b"x", b"", np.empty((2, 2, 3), np.uint8))
