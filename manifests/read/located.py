"""Which chunks a read needs and where they lie, by column: nothing here is made or looked at chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.read.places import ChunkTable

_MERGE_GAP_BYTES = 64 * 2**10  # ranges nearer than this are read as one
_MAX_SPAN_BYTES = 8 * 2**20
_CHUNK_COST_BYTES = 8 * 2**10  # as long as a chunk takes besides its bytes
_PIECE_BYTES = 2**20  # less than this is not worth a thread


@dataclass(frozen=True)
class ChunkRequest:
    """Chunks of one array to read, and the array they are decoded into."""

    array: str
    rows: NDArray[np.int64]
    views: NDArray[np.int64]
    out: NDArray[np.generic]
    """[n, *chunk_shape], contiguous."""
    starts: NDArray[np.int64] | None = None
    """Where in `out`, which is then bytes, each chunk goes as it is stored; None: arrays are decoded."""


@dataclass(frozen=True)
class LocatedChunks:
    """Chunks in the order in which they lie in their objects. Shapes: each [n]."""

    request: NDArray[np.int64]
    """For which of the requests."""
    item: NDArray[np.int64]
    """For which of its rows."""
    object_idx: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    """With the trailer."""
    crc32c: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.offset)

    def take(self, chosen: NDArray[np.integer] | NDArray[np.bool_] | slice) -> LocatedChunks:
        """Some of them."""
        return LocatedChunks(**{name: column[chosen] for name, column in self.__dict__.items()})

    def cut(self, num: int, most_bytes: int | None = None) -> list[LocatedChunks]:
        """Cut into up to `num` pieces that take about equally long, or more where they would have too many bytes."""
        total = int(self.size.sum()) + len(self) * _CHUNK_COST_BYTES
        num = max(1, min(num, total // _PIECE_BYTES))
        if most_bytes is not None:
            num = max(num, -(-total // most_bytes))
        if num == 1:
            return [self]
        cost = np.cumsum(self.size + _CHUNK_COST_BYTES)
        bounds = np.searchsorted(cost, np.linspace(0, cost[-1], num + 1)[1:-1], side="right")
        edges = np.unique([0, *bounds.tolist(), len(self)]).tolist()
        return [self.take(slice(first, last)) for first, last in pairwise(edges)]

    def spans(self) -> list[LocatedChunks]:
        """Cut where ranges begin that are to be read at once."""
        ends = self.offset + self.size
        apart = (np.diff(self.object_idx) != 0) | (self.offset[1:] - ends[:-1] > _MERGE_GAP_BYTES)
        run = np.concatenate([[0], np.cumsum(apart)])
        within = self.offset - self.offset[np.concatenate([[0], np.flatnonzero(apart) + 1])][run]
        starts = np.flatnonzero(apart | (np.diff(within // _MAX_SPAN_BYTES) != 0)) + 1
        edges = [0, *starts.tolist(), len(self)]
        return [self.take(slice(first, last)) for first, last in pairwise(edges)]


def locate_chunks(
    tables: Mapping[str, ChunkTable], requests: Sequence[ChunkRequest], trailer_bytes: int
) -> LocatedChunks:
    """The chunks of some requests, whose rows are written. A chunk that is asked for twice is there twice."""
    places = [tables[request.array].places(request.rows, request.views) for request in requests]
    objects, offset, size, crc32c = (np.concatenate(columns) for columns in zip(*places, strict=True))
    counts = [len(request.rows) for request in requests]
    order = np.lexsort((offset, objects))
    return LocatedChunks(
        np.repeat(np.arange(len(requests)), counts)[order],
        np.concatenate([np.arange(count) for count in counts])[order],
        objects[order],
        offset[order],
        size[order] + trailer_bytes,
        crc32c[order],
    )
