"""Which coding stored images get, and that an extraction writes and reads them with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dtpipe.extract.config import CodecConfig, ShardConfig
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images
from parts.extractions import Extract


@pytest.mark.parametrize(
    ("codec", "fields", "coding"),
    [
        ({}, {}, "plain"),  # v1, and whole for any reader
        ({}, {"format": "webdataset"}, "plain"),
        ({"name": "int8"}, {}, "predicted"),
        ({"levels": {"l2": "int8"}}, {"format": "webdataset"}, "webp"),
        ({"max_error": 0.03}, {"images": "joined"}, "plain"),
        ({"max_error": 0.03}, {"image_coding": "plain"}, "plain"),
        ({}, {"image_coding": "predicted"}, "predicted"),
    ],
)
def test_images_are_compact_where_levels_are(codec: dict[str, Any], fields: dict[str, Any], coding: str) -> None:
    assert ShardConfig(**fields).image_coding_of((64, 64), CodecConfig(**codec).plain) == coding


def test_webp_is_not_chosen_for_what_it_cannot_hold() -> None:
    assert ShardConfig(format="webdataset").image_coding_of((64, 16384), False) == "plain"
    with pytest.raises(ConfigError, match="image_coding is webp, which has sides up to 16383 px, not 64x16384"):
        ShardConfig(format="webdataset", image_coding="webp").image_coding_of((64, 16384))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"image_coding": "webp"}, "zarr shards have plain and predicted"),
        ({"format": "webdataset", "image_coding": "predicted"}, "webdataset shards have plain and webp"),
        ({"image_coding": "predicted", "images": "joined"}, "no images are stored; leave it out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=f"extract.shard.image_coding is .*{why}"):
        ShardConfig(**fields)  # type: ignore[arg-type]


def test_an_extraction_stores_the_same_images_in_every_coding(extract: Extract, tmp_path: Path) -> None:
    opened = {
        coding: FeatureDataset.open(extract(coding, shard={"samples": 3, "format": shards, "image_coding": coding}))
        for coding, shards in (("plain", "zarr"), ("predicted", "zarr"), ("webp", "webdataset"))
    }
    assert [dataset.recipe.image_coding for dataset in opened.values()] == list(opened)
    pixels = [read_images(dataset, dataset.columns.ok_rows) for dataset in opened.values()]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(pixels[0], pixels[2])
