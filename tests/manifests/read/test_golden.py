"""Datasets of every released format version are read in every build; they are never made again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dtpipe.manifests.canonical import unseal
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from parts import golden
from parts.paths import GOLDEN

DIGESTS = {
    "v1_zarr": "292f7548e5e1e5adc6a02071373e9c55dc1931a1c56b0c69288b0485c126be87",
    "v1_webdataset": "33748e6e8fb71eaa610de0fb20e9de2e2b868f19b96e83b9fb09da91177c5393",
}


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_golden_dataset_reads_with_the_values_it_was_made_of(name: str) -> None:
    dataset = FeatureDataset.open(GOLDEN / name)
    assert dataset.manifest is not None
    assert dataset.manifest.digest == DIGESTS[name]
    assert dict(zip(dataset.columns.keys, dataset.columns.status, strict=True)) == {
        "cat/0.png": "ok",
        "cat/2.png": "ok",
        "dog/1.png": "bad: truncated file",
    }
    for row in dataset.columns.ok_rows:
        key = dataset.columns.keys[row]
        np.testing.assert_array_equal(read_image(dataset, row), golden.true_image(key))
        for level in dataset.levels:
            for view in range(2):
                stored = read_level(dataset, level.name, row, view)
                assert stored.dtype == level.dtype
                np.testing.assert_array_equal(stored, golden.true_level(level, key)[view])
    with pytest.raises(InputError, match=r"dog/1\.png.*truncated file"):
        read_image(dataset, dataset.columns.row_of("dog/1.png"))


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_golden_dataset_verifies(name: str) -> None:
    report = verify(GOLDEN / name, "decode")
    assert report.problems == ()
    assert report.complete
    assert report.strays == ()
    assert report.num_chunks == 3 * (1 + 3 * 2)


@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_maker_still_gives_the_golden_content(shard_format: str, tmp_path: Path) -> None:
    """Not the bytes: those of PNG and zstd may change with their libraries."""
    golden.write_shards(tmp_path / "again", golden.golden_settings(shard_format))
    again, first = FeatureDataset.open(tmp_path / "again"), FeatureDataset.open(GOLDEN / f"v1_{shard_format}")
    assert again.recipe == first.recipe
    assert replace(again.columns, where="") == replace(first.columns, where="")
    names, rows = [level.name for level in first.levels], first.columns.ok_rows
    (images, coded), (first_images, first_coded) = (source.read(rows, names, [1, 0]) for source in (again, first))
    np.testing.assert_array_equal(images, first_images)
    features, first_features = coded.decode(), first_coded.decode()
    assert all(np.array_equal(features[name], first_features[name]) for name in names)


def test_specification_shows_the_golden_files() -> None:
    """The README's example is the real one."""
    readme = (GOLDEN.parent.parent / "manifests" / "README.md").read_text()
    for name in (
        "v1_zarr/plan.json",
        "v1_zarr/commits/00001.json",
        "v1_zarr/manifest.json",
        "v1_zarr/data.zarr/l2/zarr.json",
    ):
        assert (GOLDEN / name).read_text() in readme, name
    assert unseal((GOLDEN / "v1_zarr" / "plan.json").read_bytes(), "plan")["num_rows"] == 3


def test_a_copy_of_a_dataset_reads_like_the_dataset(tmp_path: Path) -> None:
    copy = shutil.copytree(GOLDEN / "v1_zarr", tmp_path / "copy")
    assert verify(copy, "decode").problems == ()
    np.testing.assert_array_equal(
        read_image(FeatureDataset.open(copy), 1), read_image(FeatureDataset.open(GOLDEN / "v1_zarr"), 1)
    )
