"""Opening the feature datasets of a config as one, with a digest that says whether a resumed run sees the same data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from dtpipe.distill.config import DistillConfig
from dtpipe.manifests.errors import ConfigError

if TYPE_CHECKING:
    from dtpipe.manifests.reader import FeatureDataset, FeatureSource


@dataclass(frozen=True)
class OpenedData:
    """What a run trains on."""

    source: FeatureSource
    student_px: tuple[int, int]
    digest: str
    """Of the datasets' contents and the rows in use, not of where they lie."""


def open_data(config: DistillConfig) -> OpenedData:
    """Open the datasets, joined by key or one after the other.

    Raises: what the readers raise; ConfigError when student sizes differ and none is set, or nothing stores the images.
    """
    from dtpipe.manifests.reader import FeatureDataset

    parts = [FeatureDataset.open(url, allow_incomplete=config.allow_incomplete) for url in config.datasets]
    without = [part.url for part in parts if part.recipe.images != "stored"]
    if without and (len(without) == len(parts) or not config.join):
        raise ConfigError(f"{without[0]} stores no images; join it with the dataset that has them (--join)")
    source = _compose(parts, config)
    sizes = {part.recipe.student_px for part in parts}
    if len(sizes) > 1 and config.student_px is None:
        raise ConfigError(f"the datasets were made for student sizes {sorted(sizes)}; set distill.student_px")
    return OpenedData(source, min(sizes), _digest(parts, source))


def _compose(parts: Sequence[FeatureDataset], config: DistillConfig) -> FeatureSource:
    from dtpipe.manifests.join import ConcatDataset, JoinedDataset

    if len(parts) == 1:
        return parts[0]
    return JoinedDataset(parts) if config.join else ConcatDataset(parts)


def _digest(parts: Sequence[FeatureDataset], source: FeatureSource) -> str:
    hasher = blake3()
    for part in parts:
        content = part.manifest.digest if part.manifest is not None else part.plan.model_dump_json(include={"recipe", "listing_blake3"})
        hasher.update(content.encode() + b"\n")
    hasher.update(np.asarray(source.ok_rows, dtype="<i8").tobytes())
    return hasher.hexdigest()
