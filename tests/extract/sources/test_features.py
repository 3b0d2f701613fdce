"""A feature dataset as a source of images: the same keys, labels and pixels, and nothing that is not sound."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dtpipe.extract.sources.features import FeaturesSource
from dtpipe.extract.sources.images import decode_image
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import IncompleteError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import JoinedDataset
from dtpipe.manifests.read.source import read_image, read_level
from parts.damage import flip


@pytest.fixture
def dataset(extract) -> FeatureDataset:
    return FeatureDataset.open(extract())


def test_samples_are_those_of_the_dataset(dataset):
    source = open_source(dataset.url)
    assert isinstance(source, FeaturesSource)
    listed = source.list()
    assert [item.key for item in listed] == sorted(dataset.columns.keys)
    for item in listed:
        row = dataset.columns.row_of(item.key)
        assert item.label == dataset.columns.labels[row]
        np.testing.assert_array_equal(decode_image(source.read(item.uri), 10**6), read_image(dataset, row))


def test_another_timestep_is_extracted_without_the_images_and_joins_the_first(dataset, extract):
    """The folder of images may be gone; features equal those that its images give."""
    late, joined_shard = {"timesteps": [150]}, {"images": "joined", "samples": 3}
    direct = FeatureDataset.open(extract("direct", noise=late))
    added = FeatureDataset.open(extract("new", images=dataset.url, noise=late, shard=joined_shard))
    joined = JoinedDataset([dataset, added])
    assert [view.timestep for view in joined.views] == [50, 150]
    for key in dataset.columns.keys:
        for level in direct.levels:
            expected = read_level(direct, level.name, direct.columns.row_of(key))
            np.testing.assert_array_equal(read_level(joined, level.name, joined.columns.row_of(key), 1), expected)


def test_bad_samples_are_left_out_and_counted(image_folder, extract):
    (image_folder / "broken.png").write_bytes(b"no image")
    source = FeaturesSource(extract(max_bad=1))
    assert "broken.png" not in [item.key for item in source.list()]
    assert source.ignored() == {"bad": 1}


def test_what_is_no_sound_dataset_with_images_is_refused(dataset, extract, tmp_path):
    with pytest.raises(InputError, match="stores no images, so it is no source of them"):
        open_source(extract("joined", shard={"images": "joined"}))
    with pytest.raises(InputError, match="holds no feature dataset"):
        FeaturesSource(str(tmp_path))
    unfinished = Path(shutil.copytree(dataset.url, tmp_path / "unfinished"))
    (unfinished / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"unfinished cannot be a source of images: .* is unfinished") as error:
        FeaturesSource(str(unfinished))
    assert isinstance(error.value.__cause__, IncompleteError)


def test_a_damaged_image_fails_the_shard_by_name(dataset):
    source = FeaturesSource(dataset.url)
    for file in Path(dataset.url).glob("data.zarr/image/c/**/*"):
        if file.is_file():
            flip(file, file.stat().st_size // 3)
    failed = 0
    for item in source.list():
        try:
            source.read(item.uri)
        except InputError as err:
            failed += 1
            assert item.key in str(err) and "crc32c differs" in str(err)
    assert failed
