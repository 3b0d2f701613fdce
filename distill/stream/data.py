"""What runs are trained on, and feature datasets as such: opened as one, with a record that says whether a resumed run
sees the same data.

One rule: opening writes nothing; whoever trains opens with `open_checked`, everyone else with `open`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from blake3 import blake3

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.record import read_record
from dtpipe.distill.stream.choice import select_rows
from dtpipe.distill.stream.live import LiveTeacher, OpenLive
from dtpipe.distill.stream.mismatched import MismatchedPairs
from dtpipe.distill.stream.sampling import Sampling
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset, JoinedDataset, composed
from dtpipe.manifests.read.source import FeatureSource
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.manifests.store.cache import ObjectCache
from dtpipe.manifests.words import count_of

if TYPE_CHECKING:
    import torch

Shards = Sequence[int] | None


@dataclass(frozen=True)
class OpenedData:
    """What a run trains on."""

    source: FeatureSource
    student_px: tuple[int, int]
    digest: str
    """Of the datasets' contents and the rows in use, not of where they lie."""
    sampling: Sampling | None = None
    """Rows in use and their passes per epoch; None: each good row once."""
    level_weights: Mapping[str, float] | None = None
    """Weight in the loss by level; None: all weigh the same."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the classes of each level of soft labels, as its channels."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What goes into the run folder's data.json."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Other sections of settings that the data follows from, to stand in the run's config.yaml."""


class TrainingData(Protocol):
    """A way to get training data; picklable, since each process of a run opens it for itself."""

    def open(self, config: DistillConfig) -> OpenedData:
        """The data of the run in `config.run.out`, as far as that knows it; writes nothing.

        Raises: what the readers raise; PlanChangedError where that is known already to be a run on other data.
        """
        ...

    def open_checked(self, config: DistillConfig) -> OpenedData:
        """As `open`, after a look at all that could stop the run later; the run folder keeps its result for `open`.

        Raises: as `open`; ErrorBudgetError when too much of it is bad.
        """
        ...

    def teacher(self, source: FeatureSource, device: torch.device) -> LiveTeacher | None:
        """The teacher that encodes samples of what was opened anew; None where all are read as they are stored."""
        ...


@dataclass(frozen=True)
class StoredData:
    """The feature datasets that settings name; readers check what they read."""

    open_live: OpenLive | None = None
    """Opens the datasets' teachers, where samples are encoded anew."""

    def open(self, config: DistillConfig) -> OpenedData:
        """As `open_data`."""
        return open_data(config)

    open_checked = open

    def teacher(self, source: FeatureSource, device: torch.device) -> LiveTeacher | None:
        """As `TrainingData.teacher`."""
        return None if self.open_live is None else self.open_live(source, device)


STORED = StoredData()


def open_data(config: DistillConfig) -> OpenedData:
    """Open the datasets, joined by key or one after the other, and choose the rows to train on.

    Of a dataset that was unfinished when the run in `out` began, the shards of then are read and no others.
    Raises: what the readers raise; ConfigError when student sizes differ and none is set, or nothing stores the images;
    InputError when no sample is left.
    """
    if not config.datasets:
        raise ConfigError(
            "distill.datasets is empty; name a feature dataset, or images and a teacher to train without one"
        )
    parts, shards = _open_parts(config)
    without = [part.url for part in parts if part.recipe.images != "stored"]
    if without and (len(without) == len(parts) or not config.join):
        raise ConfigError(f"{without[0]} stores no images; join it with the dataset that has them (--join)")
    source = composed(parts, config.join)
    sizes = {part.recipe.student_px for part in parts}
    if len(sizes) > 1 and config.student_px is None:
        raise ConfigError(f"the datasets were made for student sizes {sorted(sizes)}; set distill.student_px")
    rows = select_rows(source, config)
    contents = [_content(part, kept) for part, kept in zip(parts, shards, strict=True)]
    return OpenedData(
        source if config.mismatch is None else MismatchedPairs(source, rows, config.mismatch),
        min(sizes),
        _digest(contents, rows),
        Sampling(rows, len(source.columns), _row_weights(source, rows, config)),
        _level_weights(source, parts, config),
        _classes(source, parts),
        _record(contents, shards, rows),
    )


def _open_parts(config: DistillConfig) -> tuple[list[FeatureDataset], list[Shards]]:
    """The datasets, and for each that is or was unfinished the shards that the run keeps to."""
    recorded = read_record(Path(config.run.out))
    parts: list[FeatureDataset] = []
    shards: list[Shards] = []
    cache = cache_of(config)  # one for all, which knows what is in use
    for idx, url in enumerate(config.datasets):
        kept: Shards = recorded_shards(recorded, idx)
        part = FeatureDataset.open(url, config.run.allow_incomplete, kept, cache)
        if kept is None and (part.manifest is None or not part.manifest.complete):
            kept = list(part.shards)
        parts.append(part)
        shards.append(kept)
    return parts, shards


def cache_of(config: DistillConfig) -> ObjectCache | None:
    """Where a run keeps shards of remote datasets."""
    run = config.run
    return None if run.cache is None else ObjectCache(Path(run.cache), int(run.cache_gb * 10**9))


def recorded_shards(record: Mapping[str, Any] | None, dataset_idx: int) -> list[int] | None:
    """The shards of a dataset that a run began with; None for all of them, or for a run that begins now."""
    datasets = (record or {}).get("datasets", [])
    return datasets[dataset_idx].get("shards") if dataset_idx < len(datasets) else None


def _row_weights(source: FeatureSource, rows: np.ndarray, config: DistillConfig) -> np.ndarray | None:
    """Passes per epoch by row in use."""
    if config.sample_weights is None:
        return None
    part = source.part_of(rows) if isinstance(source, ConcatDataset) else np.zeros(len(rows), np.int64)
    weights = np.array(config.sample_weights)[part]
    if Sampling(rows, len(source.columns), weights).epoch_size == 0:
        raise ConfigError(
            f"distill.sample_weights {list(config.sample_weights)} of {count_of(len(rows), 'sample')} leave none; "
            "raise them"
        )
    return weights


def _level_weights(
    source: FeatureSource, parts: Sequence[FeatureDataset], config: DistillConfig
) -> dict[str, float] | None:
    """The weight of each level to regress: that of the dataset it is of."""
    if config.loss_weights is None:
        return None
    if isinstance(source, JoinedDataset) and source.along_views:
        raise ConfigError(
            "distill.loss_weights weigh levels, and the joined datasets hold the same levels of one teacher, as views "
            "of which each sample sees one; leave --loss-weights out"
        )
    for part, weight in zip(parts, config.loss_weights, strict=True):
        if soft_labels_of(part.recipe) is not None and weight != 1:
            raise ConfigError(
                f"distill.loss_weights weigh features, and {part.url} holds soft labels; give it 1 there, and its "
                f"weight as -s distill.labels.weight={weight:g}"
            )
    part_of = (
        {name: place.part for (name, _), place in source.places.items()} if isinstance(source, JoinedDataset) else {}
    )
    features = tuple(level.name for level in source.levels if level.role == "features")
    soft = {level.name for level in source.levels if level.role == "soft_labels"}
    names = [name for name in config.levels or features if name not in soft]
    weights = {name: config.loss_weights[part_of.get(name, 0)] for name in names}
    if not any(weights.values()):
        raise ConfigError(f"distill.loss_weights give all of {list(weights)} the weight 0; nothing is left to train on")
    return weights


def _classes(source: FeatureSource, parts: Sequence[FeatureDataset]) -> dict[str, Sequence[str]]:
    """Classes by level of soft labels, as the level is called in the source."""
    named: dict[str, Sequence[str]] = {}
    for part_idx, part in enumerate(parts):
        if (soft := soft_labels_of(part.recipe)) is None:
            continue
        name = soft.level.name
        if isinstance(source, JoinedDataset):
            name = next(
                name
                for (name, _), place in source.places.items()
                if (place.part, place.level) == (part_idx, soft.level.name)
            )
        named[name] = soft.classes
    return named


def _content(part: FeatureDataset, shards: Shards) -> str:
    """A digest of the content; of a dataset that was unfinished when the run began, of its plan."""
    if part.manifest is not None and shards is None:
        return part.manifest.digest
    return part.plan.model_dump_json(include={"recipe", "listing_blake3"})


def _digest(contents: Sequence[str], rows: np.ndarray) -> str:
    hasher = blake3()
    for content in contents:
        hasher.update(content.encode() + b"\n")
    hasher.update(np.asarray(rows, dtype="<i8").tobytes())
    return hasher.hexdigest()


def _record(contents: Sequence[str], shards: Sequence[Shards], rows: np.ndarray) -> dict[str, Any]:
    digests = [content if len(content) == 64 else blake3(content.encode()).hexdigest() for content in contents]
    return {
        "datasets": [{"digest": digest, "shards": kept} for digest, kept in zip(digests, shards, strict=True)],
        "samples": rows_record(rows),
    }


def rows_record(rows: np.ndarray) -> dict[str, Any]:
    """The rows in use, for a record."""
    return {"num": len(rows), "rows_blake3": blake3(np.asarray(rows, dtype="<i8").tobytes()).hexdigest()}
