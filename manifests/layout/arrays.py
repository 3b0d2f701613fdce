"""Which arrays a dataset stores, and a shard of them in memory and as bytes: the words both stores share.

One rule: an array is cut into chunks of one row and one view; `Members` tables list them in (row, view) order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import FittedArrays, array_name
from dtpipe.manifests.codecs.fitted import NOT_FITTED
from dtpipe.manifests.codecs.rans_tables import RansTables
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import ShapeError
from dtpipe.manifests.image_coding import PLAIN, ImageCoding
from dtpipe.manifests.pieces import Pieces
from dtpipe.manifests.schema import IMAGE, IndexRow, Members, Plan, Recipe

KEY = "key"  # name of the tar members that hold keys


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: [N, *chunk_shape], or [N, V, *chunk_shape] when it has views."""

    name: str
    dtype: np.dtype[np.generic]  # little-endian
    num_views: int | None  # None: no V axis
    chunk_shape: tuple[int, ...]
    chunk_axes: tuple[str, ...]
    level: str | None = None  # whose codec made it; None: the image
    image_coding: ImageCoding = PLAIN
    zstd_level: int = 3  # in the zarr store; 0: chunks are not compressed
    tables: Callable[[], RansTables] | None = field(default=None, compare=False)  # of the coder rans, in place of zstd

    @property
    def chunks_per_row(self) -> int:
        """Chunks that one row has."""
        return self.num_views or 1

    def shape(self, num_rows: int) -> tuple[int, ...]:
        """Shape of so many rows."""
        views = () if self.num_views is None else (self.num_views,)
        return (num_rows, *views, *self.chunk_shape)


def stored_arrays(recipe: Recipe, fitted: FittedArrays = NOT_FITTED) -> dict[str, ArraySpec]:
    """All arrays of a dataset by name: the image, then those that each level's codec makes; without `fitted`, to ask
    what there is. Raises: as `open_codec`.
    """
    arrays = {}
    if recipe.images == "stored":
        shape = (recipe.transform.height, recipe.transform.width, 3)
        axes = ("y", "x", "rgb")
        # residuals repeat by chance only, and levels above 1, which look for it, make them larger
        of_image = 1 if recipe.image_coding == "predicted" else recipe.codec.zstd_level
        coding = recipe.image_coding
        arrays[IMAGE] = ArraySpec(IMAGE, np.dtype("u1"), None, shape, axes, None, coding, of_image)
    for level, codec in level_codecs(recipe, fitted).items():
        for part, spec in codec.parts.items():
            name, views = array_name(level, part), len(recipe.views)
            zstd_level = recipe.codec.level_of(spec.sparse)
            arrays[name] = ArraySpec(
                name, spec.dtype, views, spec.shape, spec.axes, level, zstd_level=zstd_level, tables=spec.tables
            )
    return arrays


@dataclass(frozen=True)
class ShardArrays:
    """Rows of one shard in memory, coded; bad rows are zeros."""

    arrays: Mapping[str, NDArray[np.generic]]
    """As `stored_arrays` says. Shapes: image [n, H, W, 3], others [n, V, *chunk_shape]."""
    rows: Sequence[IndexRow]


@dataclass(frozen=True)
class Chunk:
    """One row and view of one array, as it is stored."""

    data: bytes
    crc32c: int

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Bytes with their checksum."""
        return cls(data, crc32c(data))


@dataclass(frozen=True)
class CodedRows:
    """Some consecutive rows of a shard as bytes, made by themselves: any thread may do it, and a shard is the sum of
    these.
    """

    rows: Sequence[IndexRow]
    chunks: Mapping[str, Sequence[Chunk]]
    """By array, in (row, view) order."""

    @property
    def size_bytes(self) -> int:
        """Of all chunks."""
        return sum(len(chunk.data) for chunks in self.chunks.values() for chunk in chunks)


@dataclass(frozen=True)
class EncodedObject:
    """The bytes of one object of a shard, and where its chunks lie in them."""

    name: str
    content: Pieces
    arrays: dict[str, Members]

    @property
    def data(self) -> bytes:
        """All of it."""
        return b"".join(self.content)

    @property
    def size_bytes(self) -> int:
        """Of all pieces."""
        return sum(map(len, self.content))


class MembersBuilder:
    """Collects a `Members` table chunk by chunk."""

    def __init__(self) -> None:
        self._offset: list[int] = []
        self._size: list[int] = []
        self._crc32c: list[int] = []

    def add(self, offset: int, chunk: Chunk) -> None:
        """Note a chunk that starts at `offset`."""
        self._offset.append(offset)
        self._size.append(len(chunk.data))
        self._crc32c.append(chunk.crc32c)

    def table(self) -> Members:
        """The finished table."""
        return Members(offset=tuple(self._offset), size=tuple(self._size), crc32c=tuple(self._crc32c))


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of bytes, as zarr's crc32c codec has it."""
    return int(google_crc32c.value(data))


def check_rows(plan: Plan, shard_idx: int, rows: Sequence[IndexRow]) -> None:
    """Raises: ShapeError when these are not the rows of a shard."""
    planned = plan.shard_rows(shard_idx)
    if [(row.row, row.shard) for row in rows] != [(row, shard_idx) for row in planned]:
        raise ShapeError(
            f"shard {shard_idx} holds rows {planned.start} to {planned.stop - 1} in the plan, other rows were given"
        )


def check_arrays(specs: Mapping[str, ArraySpec], arrays: ShardArrays) -> dict[str, NDArray[np.generic]]:
    """The arrays of some rows by name, if they are those of the recipe, in the stored dtypes.

    Raises: ShapeError naming the array.
    """
    shard_idx, named = arrays.rows[0].shard, arrays.arrays
    if named.keys() != specs.keys():
        raise ShapeError(f"shard {shard_idx} has arrays {sorted(named)}, the recipe says {sorted(specs)}")
    for name, spec in specs.items():
        values, shape = named[name], spec.shape(len(arrays.rows))
        if values.shape != shape or values.dtype != spec.dtype:
            raise ShapeError(
                f"shard {shard_idx}, array {name}: {values.dtype}{list(values.shape)} given, "
                f"the recipe says {spec.dtype}{list(shape)}"
            )
    return {name: np.ascontiguousarray(named[name]) for name in specs}
