"""Equal keys are not equal images: soft labels join what they were made of, or what shows the same pictures."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import JoinedDataset
from dtpipe.manifests.schema import TeacherRecipe
from parts.memory import level_spec, write_dataset
from parts.soft_labels import Labelled, write_labels

OTHER = TeacherRecipe(kind="toy", weights_blake3="ab" * 32)


@dataclass
class Edited(Labelled):
    """The same keys over other images: brighter by `by`."""

    by: int = 0

    def image(self, row: int) -> np.ndarray:
        return (super().image(row).astype(int) + self.by).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Stored:
    """Datasets of one test."""

    root: Path
    features: FeatureDataset
    labels: FeatureDataset

    def again(self, name: str, by: int) -> FeatureDataset:
        """Another teacher's features of images that are brighter by so much."""
        source = Edited(num_rows=12, bad=(3,), levels=(level_spec("l4", 16, 4),), by=by)
        return FeatureDataset.open(write_dataset(self.root / name, source, teacher=OTHER))


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    source = Labelled(num_rows=12, bad=(3,), levels=(level_spec("l4", 16, 4),))
    features = write_dataset(tmp_path / "features", source)
    labels = write_labels(tmp_path / "labels", source, features)
    return Stored(tmp_path, FeatureDataset.open(features), FeatureDataset.open(labels))


def test_labels_join_their_own_features_and_others_of_the_same_images(stored: Stored) -> None:
    for features in (stored.features, stored.again("same", 0), stored.again("decoded elsewhere", 1)):
        for parts in ([features, stored.labels], [stored.labels, features]):
            assert {level.name for level in JoinedDataset(parts).levels} == {"l4", "l3.labels"}


def test_labels_of_changed_images_are_refused(stored: Stored) -> None:
    edited = stored.again("edited", 60)
    message = (
        r"hold different images under equal keys, such as 'images/\d+.png'; make labels of these features .*labels"
    )
    with pytest.raises(ConfigError, match=message):
        JoinedDataset([edited, stored.labels])
    with pytest.raises(ConfigError, match=r"different images under equal keys, .*; extract one of them again"):
        JoinedDataset([stored.features, edited])


def test_labels_whose_features_are_gone_are_of_nobody_knows_what(stored: Stored) -> None:
    same = stored.again("same", 0)
    shutil.move(stored.root / "features", stored.root / "elsewhere")
    with pytest.raises(ConfigError, match=r"no longer where they were.*--interpreter .. --from .*same"):
        JoinedDataset([same, stored.labels])
    moved = FeatureDataset.open(stored.root / "elsewhere")
    assert len(JoinedDataset([moved, stored.labels]).levels) == 2  # by digest, wherever it lies
    shutil.copytree(stored.root / "same", stored.root / "features")  # another dataset in its place
    with pytest.raises(ConfigError, match=r"no longer where they were"):
        JoinedDataset([same, stored.labels])
