"""Where the features of labelled images lie in a dataset: under their key, or under another with the same pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from blake3 import blake3

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.records.image_digests import short_digest
from dtpipe.pipeline.rivals.digests import DigestStore

_BATCH = 256  # images of the dataset that are looked at together


@dataclass(frozen=True)
class FoundRows:
    """Rows of a dataset for labelled images."""

    rows: tuple[int | None, ...]
    """None for an image that the dataset does not hold."""
    num_by_key: int
    num_by_content: int

    @property
    def num_missing(self) -> int:
        """Images that only the teacher can give features of."""
        return self.rows.count(None)


def own_key(key: str) -> str:
    """A key as its source has it, also of an image that is held out."""
    return key.removeprefix("held out/")


def places_by_content(dataset: FeatureDataset, store: DigestStore) -> Callable[[], Mapping[int, int]]:
    """The first row of each image, by digest; asked for once or never, since all images are read for it."""

    @cache
    def places() -> Mapping[int, int]:
        digests = store.of_dataset(dataset, f"labelled images are looked for in {dataset.url}")
        different, first = np.unique(digests, return_index=True)
        return dict(zip(different.tolist(), dataset.columns.ok_rows[first].tolist(), strict=True))

    return places


def find_rows(dataset: FeatureDataset, labelled: LabelledSet, by_content: Callable[[], Mapping[int, int]]) -> FoundRows:
    """Look images up. Where the dataset stores images, an equal key counts with equal pixels only; where it stores
    none, keys are all there is to go by. `by_content` is asked where some are not there under their key.

    Raises: what reading the dataset or an image raises.
    """
    by_key = [_row_of_key(dataset, own_key(key)) for key in labelled.keys]
    if dataset.recipe.images != "stored":
        return _found(by_key, by_key)
    wanted = [_digest(labelled, row) for row in range(len(labelled))]
    there = [place for place in by_key if place is not None]
    stored = dict(_digests(dataset, there))
    same = [
        place if place is not None and stored[place] == digest else None
        for place, digest in zip(by_key, wanted, strict=True)
    ]
    if None not in same:
        return _found(same, same)
    places = by_content()
    rows = [
        places.get(short_digest(digest)) if place is None else place for digest, place in zip(wanted, same, strict=True)
    ]
    return _found(rows, same)


def _found(rows: Sequence[int | None], by_key: Sequence[int | None]) -> FoundRows:
    num_by_key = len(by_key) - list(by_key).count(None)
    return FoundRows(tuple(rows), num_by_key, len(rows) - list(rows).count(None) - num_by_key)


def _row_of_key(dataset: FeatureDataset, key: str) -> int | None:
    row = dataset.columns.find(key)
    return row if row is not None and dataset.columns.status[row] == "ok" else None


def _digest(labelled: LabelledSet, row: int) -> str:
    return labelled.digests[row] if labelled.digests else blake3(labelled.image(row).tobytes()).hexdigest()


def _digests(dataset: FeatureDataset, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
    """blake3 of the pixels of stored images, by row."""
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        images, _ = dataset.read(part, (), np.zeros(len(part), np.int64))
        yield from ((row, blake3(image.tobytes()).hexdigest()) for row, image in zip(part, images, strict=True))
