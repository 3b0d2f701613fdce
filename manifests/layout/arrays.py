"""Which arrays a dataset stores, and a shard of them in memory and as bytes: the words both stores share.

One rule: an array is cut into chunks of one row and one view; `Members` tables list them in (row, view) order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import stored_dtype
from dtpipe.manifests.errors import ShapeError
from dtpipe.manifests.schema import IMAGE, IndexRow, Members, Plan, Recipe

KEY = "key"  # name of the tar members that hold keys


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: [N, *chunk_shape], or [N, V, *chunk_shape] when it has views."""

    name: str
    dtype: np.dtype[np.generic]  # little-endian
    num_views: int | None  # None: no V axis
    chunk_shape: tuple[int, ...]

    @property
    def chunks_per_row(self) -> int:
        """Chunks that one row has."""
        return self.num_views or 1

    def shape(self, num_rows: int) -> tuple[int, ...]:
        """Shape of so many rows."""
        views = () if self.num_views is None else (self.num_views,)
        return (num_rows, *views, *self.chunk_shape)


def stored_arrays(recipe: Recipe) -> dict[str, ArraySpec]:
    """All arrays of a dataset by name, image first. A codec with side parameters per sample adds its own arrays here."""
    arrays = {}
    if recipe.images == "stored":
        arrays[IMAGE] = ArraySpec(IMAGE, np.dtype("u1"), None, (recipe.transform.height, recipe.transform.width, 3))
    for level in recipe.levels:
        shape = (level.channels, level.height, level.width)
        arrays[level.name] = ArraySpec(level.name, stored_dtype(level, recipe.codec), len(recipe.views), shape)
    return arrays


@dataclass(frozen=True)
class ShardArrays:
    """All rows of one shard in memory; bad rows are zeros.

    Levels are in their stored dtype, or float to be coded on writing.
    Shapes: image [n, H, W, 3] uint8 or None, levels {name: [n, V, C, H, W]}.
    """

    image: NDArray[np.uint8] | None
    levels: Mapping[str, NDArray[np.generic]]
    rows: Sequence[IndexRow]

    def named(self) -> dict[str, NDArray[np.generic]]:
        """Arrays by name."""
        images: dict[str, NDArray[np.generic]] = {} if self.image is None else {IMAGE: self.image}
        return {**images, **self.levels}


@dataclass(frozen=True)
class EncodedObject:
    """The bytes of one object of a shard, and where its chunks lie in them."""

    name: str
    data: bytes
    arrays: dict[str, Members]


class MembersBuilder:
    """Collects a `Members` table chunk by chunk."""

    def __init__(self) -> None:
        self._offset: list[int] = []
        self._size: list[int] = []
        self._crc32c: list[int] = []

    def add(self, offset: int, chunk: bytes) -> int:
        """Note a chunk that starts at `offset`; returns its crc32c."""
        checksum = crc32c(chunk)
        self._offset.append(offset)
        self._size.append(len(chunk))
        self._crc32c.append(checksum)
        return checksum

    def table(self) -> Members:
        """The finished table."""
        return Members(offset=tuple(self._offset), size=tuple(self._size), crc32c=tuple(self._crc32c))


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of bytes, as zarr's crc32c codec has it."""
    return int(google_crc32c.value(data))


def check_arrays(plan: Plan, shard_idx: int, arrays: ShardArrays) -> dict[str, NDArray[np.generic]]:
    """The arrays of a shard by name, if they are those of its plan, in the stored dtypes.

    Raises: ShapeError naming the array.
    """
    rows, specs, named = plan.shard_rows(shard_idx), stored_arrays(plan.recipe), arrays.named()
    if [(row.row, row.shard) for row in arrays.rows] != [(row, shard_idx) for row in rows]:
        raise ShapeError(
            f"shard {shard_idx} holds rows {rows.start} to {rows.stop - 1} in the plan, other rows were given"
        )
    if named.keys() != specs.keys():
        raise ShapeError(f"shard {shard_idx} has arrays {sorted(named)}, the recipe says {sorted(specs)}")
    for name, spec in specs.items():
        found = named[name]
        shape = spec.shape(len(rows))
        if found.shape != shape or found.dtype != spec.dtype:
            raise ShapeError(
                f"shard {shard_idx}, array {name}: {found.dtype}{list(found.shape)} given, the recipe says {spec.dtype}{list(shape)}"
            )
    return {name: np.ascontiguousarray(named[name]) for name in specs}
