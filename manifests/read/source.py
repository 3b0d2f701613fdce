"""What everything reads from: columns by row, and images with coded levels of any rows and views.

One rule: the interface is `columns` and `read` and what says their axes; what can be had from these is a function here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.coded import CodedLevels
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.read.texts import rows_with
from dtpipe.manifests.schema import LevelSpec, ViewSpec

Integers = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class Columns:
    """What is known of each row, bad and missing ones too."""

    where: str
    """Of which data, for messages."""
    keys: Sequence[str]
    labels: Sequence[str | None]
    status: Sequence[str]
    """`ok`, `bad: ` and the reason, or `missing` for a shard that is not written."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def ok_rows(self) -> NDArray[np.int64]:
        """Rows that can be read, in order."""
        return np.flatnonzero(self.is_ok).astype(np.int64)

    @cached_property
    def is_ok(self) -> NDArray[np.bool_]:
        """By row, whether it can be read. Shapes: -> [N]."""
        return rows_with(self.status, "ok")

    def row_of(self, key: str) -> int:
        """Row of a key. Raises: InputError for an unknown one."""
        if key not in self._row_of:
            raise InputError(f"{self.where} has no sample {key!r}; keys look like {self.keys[0]!r}")
        return self._row_of[key]

    def find(self, key: str) -> int | None:
        """Row of a key; None for an unknown one."""
        return self._row_of.get(key)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}


class FeatureSource(Protocol):
    """One dataset, several joined by key, several one after the other, or images that a teacher encodes live."""

    @property
    def columns(self) -> Columns: ...

    @property
    def levels(self) -> tuple[LevelSpec, ...]: ...

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The same for all rows."""
        ...

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def read(
        self, rows: Integers, names: Sequence[str], views: Integers, images: bool = True
    ) -> tuple[NDArray[np.uint8], CodedLevels]:
        """Images and the levels `names` of some rows, in their order; `views[i]` is the view of `rows[i]`.

        Shapes: -> images [B, H, W, 3] uint8 ([0, H, W, 3] without `images`), levels of B samples.
        Raises: DamagedDataError naming shard, level, sample and object; InputError for bad and unknown rows,
        IncompleteError for missing ones; ConfigError for an unknown level or view, or when images are asked for and
        not stored.
        """
        ...


def read_images(source: FeatureSource, rows: Integers) -> NDArray[np.uint8]:
    """The stored images of some rows. Shapes: -> [B, H, W, 3] uint8. Raises: as `read`."""
    return source.read(rows, (), np.zeros(len(rows), np.int64))[0]


def read_image(source: FeatureSource, row: int) -> NDArray[np.uint8]:
    """One stored image. Shapes: -> [H, W, 3] uint8. Raises: as `read`."""
    image: NDArray[np.uint8] = read_images(source, [row])[0]
    return image


def read_level(source: FeatureSource, name: str, row: int, view: int = 0) -> NDArray[np.generic]:
    """The features of one level and view of one sample. Shapes: -> [C, H, W]. Raises: as `read`."""
    level: NDArray[np.generic] = source.read([row], (name,), [view], images=False)[1].decode()[name][0]
    return level
