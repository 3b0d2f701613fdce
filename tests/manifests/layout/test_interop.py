"""Both stores are read without dtpipe: by plain webdataset, zarr-python and tensorstore, with equal values."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image
from dtpipe.manifests.schema import LevelSpec
from parts import golden
from parts.damage import flip
from parts.paths import REPO

SETTINGS = {"num_rows": 7, "samples": 3}


def stored_level(dataset: FeatureDataset, level: LevelSpec) -> np.ndarray:
    """All rows of a level from what it was made of; bad rows zero."""
    rows = zip(dataset.columns.keys, dataset.columns.status, strict=True)
    return np.stack([golden.true_level(level, key) * np.uint8(status == "ok") for key, status in rows])


@pytest.fixture(scope="module", params=[3, 0])
def zarr_dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureDataset:
    """A zarr dataset whose last shard is short; compressed, and not."""
    root = tmp_path_factory.mktemp("zarr")
    golden.write_shards(root, golden.Settings(format="zarr", zstd_level=request.param, **SETTINGS))
    return FeatureDataset.open(root)


def test_zarr_python_reads_equal_values(zarr_dataset: FeatureDataset) -> None:
    group = zarr.open_group(f"{zarr_dataset.url}/data.zarr", mode="r")
    assert sorted(name for name, _ in group.arrays()) == ["image", "l2", "l3", "l4.b"]
    for level in zarr_dataset.levels:
        array = group[level.name]
        assert isinstance(array, zarr.Array)
        assert array.dtype == level.dtype
        np.testing.assert_array_equal(array[:], stored_level(zarr_dataset, level))
    images = group["image"]
    assert isinstance(images, zarr.Array)
    for row in zarr_dataset.columns.ok_rows:
        np.testing.assert_array_equal(images[int(row)], read_image(zarr_dataset, row))


def test_tensorstore_reads_equal_values(zarr_dataset: FeatureDataset) -> None:
    for level in zarr_dataset.levels:
        path = f"{zarr_dataset.url}/data.zarr/{level.name}/"
        array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
        np.testing.assert_array_equal(array.read().result(), stored_level(zarr_dataset, level))


def test_zarr_python_and_tensorstore_raise_on_a_flipped_byte(zarr_dataset: FeatureDataset) -> None:
    """What makes the format safe for readers other than ours."""
    path = Path(zarr_dataset.url) / "data.zarr/l2/c/1/0/0/0/0"
    whole = path.read_bytes()
    try:
        flip(path, 5)
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_array(f"{zarr_dataset.url}/data.zarr/l2", mode="r")[3:6]
        kvstore = {"driver": "file", "path": f"{zarr_dataset.url}/data.zarr/l2/"}
        with pytest.raises(ValueError, match="l2/c/1/0/0/0/0"):
            tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    finally:
        path.write_bytes(whole)


def test_plain_webdataset_reads_equal_values(tmp_path: Path) -> None:
    golden.write_shards(tmp_path, golden.Settings(format="webdataset", **SETTINGS))
    dataset = FeatureDataset.open(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset's own, on import and on few shards
        import webdataset

        urls = [str(path) for path in sorted((tmp_path / "data").glob("*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        bare = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"].rpartition("/")[2] for sample in samples] == [f"{row:08d}" for row in range(7)]
    for row, (sample, without) in enumerate(zip(samples, bare, strict=True)):
        assert sample["key.json"] == {
            "row": row,
            "key": dataset.columns.keys[row],
            "label": dataset.columns.labels[row],
            "ok": dataset.columns.status[row] == "ok",
        }
        for level in dataset.levels:
            truth = stored_level(dataset, level)[row]
            for view in (0, 1):
                np.testing.assert_array_equal(sample[f"{level.name}.v{view}.npy"], truth[view])
                np.testing.assert_array_equal(without[f"{level.name}.v{view}.npy"], truth[view])
        if dataset.columns.status[row] == "ok":
            np.testing.assert_array_equal(sample["image.png"], read_image(dataset, row))


def test_the_documented_webdataset_pipeline_reads_every_sample(tmp_path: Path) -> None:
    """The example of docs/datasets.md as a user would run it, with worker processes and without dtpipe."""
    golden.write_shards(tmp_path / "features", golden.Settings(format="webdataset", num_rows=8, samples=4))
    page = (REPO / "docs" / "datasets.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch\nimport webdataset.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dataset = FeatureDataset.open(tmp_path / "features")
    shapes = [[int(number) for number in re.findall(r"\d+", line)] for line in done.stdout.splitlines()]
    (level,) = (level for level in dataset.levels if level.name == "l2")
    assert sum(batch for batch, *_ in shapes) == len(dataset.columns.ok_rows)
    assert {tuple(rest) for batch, *rest in shapes} == {
        (3, *dataset.image_px, batch, level.channels, level.height, level.width) for batch, *_ in shapes
    }
