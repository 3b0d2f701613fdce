"""A codec with an array of its own in both stores: bad rows are zeros, damage is found, and nobody sees symbols."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.codecs.base import decode_level, encode_level
from dtpipe.manifests.codecs.registry import CODECS
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.layout.arrays import stored_arrays
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import CodecSpec, Plan
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import load_entry
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import bytes_per_sample, load_plan, plan_digest
from dtpipe.manifests.write.shard import ShardArrays
from parts import codecs, golden
from parts.damage import flip
from parts.datasets import write_features
from parts.paths import REPO

TURNED = tuple(level.model_copy(update={"codec": CodecSpec(name="turned")}) for level in golden.LEVELS)
FORMATS = ("zarr", "webdataset")


@pytest.fixture(autouse=True)
def turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codec is known."""
    monkeypatch.setitem(CODECS, codecs.CODEC.name, codecs.CODEC)


def settings(shard_format: str = "zarr") -> golden.Settings:
    return golden.Settings(format=shard_format, num_rows=7, samples=3, levels=TURNED)


@pytest.mark.parametrize("shard_format", FORMATS)
def test_features_come_back_by_row_and_view_and_bad_rows_are_zeros(shard_format: str, tmp_path: Path) -> None:
    golden.write_shards(tmp_path, settings(shard_format))
    dataset = FeatureDataset.open(tmp_path)
    rows = [int(row) for row in dataset.columns.ok_rows[::-1]]
    for view in (0, 1):
        _, coded = dataset.read(rows, [level.name for level in TURNED], [view] * len(rows))
        for level in TURNED:
            true = np.stack([golden.true_level(level, dataset.columns.keys[row])[view] for row in rows])
            np.testing.assert_array_equal(coded.decode()[level.name], true)  # sums of a few powers of two: no rounding
    report = verify(tmp_path, "decode")
    assert report.ok  # which reads bad rows too, and finds any that is not zero
    assert report.num_chunks == 7 * (1 + 3 * 2 * 2)


@pytest.mark.parametrize("shard_format", FORMATS)
def test_a_flipped_byte_beside_the_symbols_is_found_and_sent_back(shard_format: str, tmp_path: Path) -> None:
    golden.write_shards(tmp_path, settings(shard_format))
    store = Store(tmp_path)
    entry = load_entry(store, load_plan(store), plan_digest(store), 0)
    (stored,) = (stored for stored in entry.objects if "l2_three" in stored.arrays)
    row = next(index.row for index in entry.rows if index.status == "ok")
    flip(tmp_path / stored.name, stored.arrays["l2_three"].offset[2 * row + 1] + 5)  # of its second view
    dataset = FeatureDataset.open(tmp_path)
    read_level(dataset, "l2", row, 0)
    with pytest.raises(
        DamagedDataError, match=rf"level l2 \(array l2_three\) of sample '{dataset.columns.keys[row]}'.*view 1"
    ):
        read_level(dataset, "l2", row, 1)
    assert {problem.shard for problem in verify(tmp_path, "decode").problems} == {0}
    assert repair(tmp_path, stale_s=1).shards == (0,)


def test_symbols_that_decode_to_no_number_are_found(tmp_path: Path) -> None:
    def spoiled(plan: Plan, listing: Listing, shard_idx: int) -> ShardArrays:
        shard = golden.shard_arrays(plan, listing, shard_idx, settings())
        for idx, row in enumerate(shard.rows):
            if row.key == "cat/2.png":
                shard.arrays["l3_three"][idx, 1] = np.nan
        return shard

    write_features(tmp_path, golden.make_recipe(settings()), golden.make_listing(settings()), spoiled)
    (problem,) = verify(tmp_path, "decode").problems
    assert problem.what.startswith("l3 of sample 'cat/2.png'") and problem.what.endswith("is not finite")


def test_bytes_per_sample_count_every_array_that_a_codec_makes() -> None:
    recipe = golden.make_recipe(settings())
    arrays_ = [spec for spec in stored_arrays(recipe).values() if spec.level]
    assert [spec.name for spec in arrays_] == ["l2", "l2_three", "l3", "l3_three", "l4.b", "l4.b_three"]
    expected = sum(2 * int(np.prod(spec.chunk_shape)) * spec.dtype.itemsize for spec in arrays_)
    assert bytes_per_sample(TURNED, 2, None) == expected == 2 * 4 * (12 + 12 + 10 + 3)
    assert bytes_per_sample(golden.LEVELS, 2, (4, 6)) == 2 * (2 * 12 + 2 * 12 + 4 * 10) + 72


@given(arrays(np.float32, (2, 5, 1, 2), elements=st.floats(-1e6, 1e6, width=32)))
def test_decoded_features_are_within_the_stated_error(values: np.ndarray) -> None:
    codec = codecs.TurnedLevel(golden.LEVELS[2])
    parts = encode_level(codec, values)
    distance = decode_level(codec, parts).astype(np.float64) - values
    assert (np.sqrt(np.square(distance).mean(axis=(1, 2, 3))) <= codec.error(parts)).all()


def test_symbols_are_touched_where_they_are_coded_and_nowhere_else() -> None:
    """`CodedLevels.pieces` is the only way to them."""
    users = {
        path.relative_to(REPO).as_posix()
        for folder in ("manifests", "extract", "distill", "pipeline")
        for path in (REPO / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "pieces"
    }
    assert users == {"manifests/codecs/coded.py", "manifests/read/join.py", "distill/stream/decode.py"}
