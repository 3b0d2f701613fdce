"""The datasets that a page is about, as one source, and where each sample and level lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset, JoinedDataset
from dtpipe.manifests.read.source import FeatureSource
from dtpipe.manifests.store.paths import is_url
from dtpipe.manifests.write.commit import MANIFEST_FILE
from dtpipe.manifests.write.plan import PLAN_FILE
from dtpipe.pipeline.report.maps.features import RowIdxs


def is_dataset(place: str) -> bool:
    """True for a URL, and for a folder with a manifest or a plan."""
    return is_url(place) or any((Path(place) / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE))


@dataclass(frozen=True)
class OpenedDatasets:
    """One dataset, several joined by key, or several one after the other."""

    parts: tuple[FeatureDataset, ...]
    source: FeatureSource

    @classmethod
    def open(cls, urls: Sequence[str], join: bool) -> OpenedDatasets:
        """Unfinished ones as far as they are. Raises: what the readers raise; ConfigError for what does not fit."""
        parts = tuple(FeatureDataset.open(url, allow_incomplete=True) for url in urls)
        if len(parts) == 1:
            return cls(parts, parts[0])
        return cls(parts, JoinedDataset(parts) if join else ConcatDataset(parts))

    @property
    def has_images(self) -> bool:
        """Whether `read` gives images."""
        stored = [part.recipe.images == "stored" for part in self.parts]
        return any(stored) if isinstance(self.source, JoinedDataset) else all(stored)

    def shards(self) -> RowIdxs:
        """The shard of each row, counted through where datasets lie one after the other. Shapes: -> (N)."""
        if isinstance(self.source, ConcatDataset):
            numbers, start = [], 0
            for part in self.parts:
                numbers.append(start + np.arange(len(part.columns)) // part.recipe.shard.samples)
                start += part.plan.num_shards
            return np.concatenate(numbers)
        return np.arange(len(self.source.columns)) // self.parts[0].recipe.shard.samples

    def shards_of_level(self, name: str, rows: RowIdxs) -> RowIdxs:
        """The shards in which a level of some rows lies. Shapes: (n) -> (n)."""
        if not isinstance(self.source, JoinedDataset):
            return self.shards()[rows]
        part = self.parts[self.source.places[name, 0].part]
        own = np.array([part.columns.row_of(self.source.columns.keys[row]) for row in rows], np.int64)
        return own // part.recipe.shard.samples

    def stored_as(self, name: str) -> list[tuple[FeatureDataset, str]]:
        """The datasets that hold a level, and its name there."""
        if not isinstance(self.source, JoinedDataset):
            return [(part, name) for part in self.parts]
        views = range(len(self.source.views))
        places = dict.fromkeys(
            (self.source.places[name, view].part, self.source.places[name, view].level) for view in views
        )
        return [(self.parts[part], own) for part, own in places]
