"""A control: every image keeps itself and gets the features of exactly one other image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtpipe.distill.stream.data import open_data
from dtpipe.distill.stream.mismatched import MismatchedPairs
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.source import read_images, read_level
from parts.memory import MemorySource, tiny_config, write_dataset


def test_images_keep_their_pixels_and_get_each_others_features(tmp_path: Path, source: MemorySource) -> None:
    url = str(write_dataset(tmp_path / "features", source))
    true = open_data(tiny_config(tmp_path / "run", datasets=(url,)))
    mixed = open_data(tiny_config(tmp_path / "run", datasets=(url,), mismatch=3))
    assert isinstance(mixed.source, MismatchedPairs) and mixed.sampling is not None
    rows = mixed.sampling.rows
    assert np.array_equal(read_images(mixed.source, rows), read_images(true.source, rows))
    own = {read_level(true.source, "l2", row).tobytes(): row for row in rows}
    partners = [own[read_level(mixed.source, "l2", row).tobytes()] for row in rows]
    assert sorted(partners) == sorted(rows) and not any(
        partner == row for partner, row in zip(partners, rows, strict=True)
    )
    again = open_data(tiny_config(tmp_path / "run", datasets=(url,), mismatch=3)).source
    other = open_data(tiny_config(tmp_path / "run", datasets=(url,), mismatch=4)).source
    levels = [[read_level(each, "l2", row).tobytes() for row in rows] for each in (mixed.source, again, other)]
    assert levels[0] == levels[1] != levels[2]


def test_a_mismatch_needs_stored_features_of_two_images(tmp_path: Path, source: MemorySource) -> None:
    with pytest.raises(ValueError, match="live teacher runs"):
        tiny_config(tmp_path, datasets=("features",), mismatch=0, reencode=0.5)
    with pytest.raises(ConfigError, match="there is one image"):
        MismatchedPairs(source, source.columns.ok_rows[:1], 0)
