"""What a worker runs for soft labels: an interpreter over stored features, or behind a teacher that runs live."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtpipe.distill.labels.head import OpenHead, open_head
from dtpipe.extract.encode import Encoded
from dtpipe.extract.shards.producer import PreparedRow
from dtpipe.extract.shards.teacher import TeacherJob, TeacherProducer
from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.errors import DamagedDataError, InputError
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import IndexRow, Plan, Recipe
from dtpipe.manifests.write.listing import Listing


@dataclass(frozen=True)
class CachedJob:
    """An interpreter over a feature dataset; a `Job`."""

    interpreter: str
    features: str

    def open(self, plan: Plan, listing: Listing, device: str) -> CachedProducer:  # noqa: ARG002  keys say which rows
        """Raises: InputError for another dataset than the plan's; as `open_head` and `FeatureDataset.open`."""
        dataset = open_features(self.features, plan.recipe)
        return CachedProducer(open_head(self.interpreter, plan.recipe, dataset.recipe, device), dataset)


def open_features(url: str, recipe: Recipe) -> FeatureDataset:
    """The feature dataset that a recipe of soft labels names. Raises: InputError when it is another one."""
    dataset = FeatureDataset.open(url)
    expected = recipe.teacher.options["features"].get("dataset")
    if digest_of(dataset) != expected:
        raise InputError(
            f"{url} has digest {digest_of(dataset)[:16]}.., the soft labels are of the features with "
            f"{str(expected)[:16]}..; put that dataset back, or choose another --out"
        )
    return dataset


def digest_of(dataset: FeatureDataset) -> str:
    """The digest of a complete dataset."""
    assert dataset.manifest is not None
    return dataset.manifest.digest


@dataclass(frozen=True)
class CachedProducer:
    """A `Producer`; the content of a row is its levels, {level: [V, C, h, w]}."""

    head: OpenHead
    dataset: FeatureDataset

    def prepare(self, index: IndexRow) -> PreparedRow:
        """The stored features of one row; one that is bad there is bad here.

        Raises: InputError when the features are damaged there.
        """
        started_s = time.perf_counter()
        row = self.dataset.columns.row_of(index.key)
        if (status := self.dataset.columns.status[row]) != "ok":
            return PreparedRow(index.model_copy(update={"status": status}), None)
        num_views, names = len(self.dataset.views), [level.name for level in self.head.network.spec.levels]
        try:
            _, coded = self.dataset.read([row] * num_views, names, range(num_views), images=False)
        except DamagedDataError as err:
            raise InputError(str(err)) from err
        read_s = time.perf_counter() - started_s
        return PreparedRow(index, coded.decode(), {"read": read_s})

    def produce(self, rows: Sequence[PreparedRow], batch_size: int) -> Encoded:
        """As `Producer.produce`; bad rows are zeros."""
        import torch

        first = next(row.content for row in rows if row.content is not None)
        missing = {name: np.zeros_like(values) for name, values in first.items()}
        contents = [missing if row.content is None else row.content for row in rows]
        levels = {name: torch.from_numpy(np.stack([content[name] for content in contents])) for name in first}
        return Encoded(self.head.soft_labels(levels, batch_size), None)

    def measure(
        self,
        arrays: ShardArrays,  # noqa: ARG002
        codecs: Mapping[str, LevelCodec],  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Nothing: the head runs in float32."""
        return {}


@dataclass(frozen=True)
class LiveJob:
    """An interpreter behind a teacher, over images or over samples that the teacher makes; a `Job`."""

    interpreter: str
    teacher: TeacherJob
    features: Recipe
    """What the teacher gives, and is not stored."""

    def open(self, plan: Plan, listing: Listing, device: str) -> LiveProducer:
        """Raises: as `open_head` and `TeacherJob.open`."""
        head = open_head(self.interpreter, plan.recipe, self.features, device)
        of_features = plan.model_copy(update={"recipe": self.features})
        return LiveProducer(head, self.teacher.open(of_features, listing, device))


@dataclass(frozen=True)
class LiveProducer:
    """A `Producer`; rows are prepared as the teacher's are."""

    head: OpenHead
    teacher: TeacherProducer

    def prepare(self, index: IndexRow) -> PreparedRow:
        """As `TeacherProducer.prepare`."""
        return self.teacher.prepare(index)

    def produce(self, rows: Sequence[PreparedRow], batch_size: int) -> Encoded:
        """Soft labels, and the images that the teacher saw or made."""
        encoded = self.teacher.produce(rows, batch_size)
        return Encoded(self.head.soft_labels(encoded.levels, batch_size), encoded.images)

    def measure(
        self,
        arrays: ShardArrays,  # noqa: ARG002
        codecs: Mapping[str, LevelCodec],  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Nothing: what low precision costs is measured on features, and none are stored."""
        return {}
