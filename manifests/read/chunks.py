"""Reading chunks so that no wrong byte gets through. The same code for both stores.

One rule: the entry decides. A chunk's bytes are compared with the size and crc32c of its entry before they are decoded,
so a flipped byte, a truncated, missing, stale or swapped object fails at the first chunk that is touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.layout.arrays import ArraySpec, crc32c, stored_arrays
from dtpipe.manifests.read.places import ChunkTable
from dtpipe.manifests.schema import Plan
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.shard import SHARD_FORMATS

_MERGE_GAP_BYTES = 64 * 2**10  # ranges nearer than this are read as one
_MAX_SPAN_BYTES = 8 * 2**20
_THREADS = 4
Keys = Sequence[str] | Mapping[int, str]
"""By row, for messages."""


@dataclass(frozen=True)
class ChunkRequest:
    """One chunk to read, and the array it is decoded into."""

    array: str
    row: int
    view: int
    out: NDArray[np.generic]


@dataclass(frozen=True)
class _Located:
    request: ChunkRequest
    object_name: str
    offset: int
    size: int  # with the trailer
    crc32c: int


class ChunkReader:
    """Reads and decodes chunks with a few threads; picklable, and usable after a fork."""

    def __init__(self, store: Store, plan: Plan, tables: Mapping[str, ChunkTable], keys: Keys) -> None:
        self.store, self.tables, self._plan, self._keys = store, tables, plan, keys
        self.arrays: dict[str, ArraySpec] = stored_arrays(plan.recipe)
        self._kind = SHARD_FORMATS[plan.recipe.shard.format]
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_kind": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kind = SHARD_FORMATS[self._plan.recipe.shard.format]

    def read(self, requests: Sequence[ChunkRequest]) -> None:
        """Fill the `out` of every request; neighbouring chunks are read as one range.

        Raises: DamagedDataError naming shard, array, sample and object.
        """
        spans = list(_spans(self._locate(request) for request in requests))
        if len(spans) == 1:
            self._read_span(spans[0])
            return
        for _ in self._threads().map(self._read_span, spans):
            pass

    def read_bytes(self, array: str, row: int, view: int = 0) -> bytes:
        """The checked bytes of one chunk, not decoded."""
        located = self._locate(ChunkRequest(array, row, view, np.empty(0)))
        return self._checked(located, self._fetch(located))[0]

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(_THREADS, thread_name_prefix="dtpipe-chunks")
        return self._pool[1]

    def _locate(self, request: ChunkRequest) -> _Located:
        name, offset, size, checksum = self.tables[request.array].place(request.row, request.view)
        assert name is not None, "a row that was never written must be refused before"
        return _Located(request, name, offset, size + self._kind.trailer_bytes, checksum)

    def _read_span(self, span: Sequence[_Located]) -> None:
        start, end = span[0].offset, max(chunk.offset + chunk.size for chunk in span)
        try:
            data = self.store.read_range(span[0].object_name, start, end - start) if len(span) > 1 else None
        except DamagedDataError:  # one by one, to name the chunk that is hit and no other
            data = None
        for chunk in span:
            here = chunk.offset - start
            self._decode(chunk, self._fetch(chunk) if data is None else data[here : here + chunk.size])

    def _fetch(self, located: _Located) -> bytes:
        try:
            return self.store.read_range(located.object_name, located.offset, located.size)
        except DamagedDataError as err:
            raise self._damaged(located, str(err).split(";")[0]) from err

    def _checked(self, located: _Located, data: bytes) -> tuple[bytes, bytes]:
        """Chunk and trailer. Raises: DamagedDataError when the chunk is not the one of the entry."""
        size = located.size - self._kind.trailer_bytes
        chunk = data[:size]
        if crc32c(chunk) != located.crc32c:
            raise self._damaged(
                located, "its bytes are not those of the manifest (crc32c differs): damaged, stale or swapped"
            )
        return chunk, data[size:]

    def _decode(self, located: _Located, data: bytes) -> None:
        chunk, trailer = self._checked(located, data)
        try:
            self._kind.decode(self.arrays[located.request.array], chunk, trailer, located.request.out)
        except DamagedDataError as err:
            raise self._damaged(located, str(err)) from err

    def _damaged(self, located: _Located, why: str) -> DamagedDataError:
        request = located.request
        level = self.arrays[request.array].level if request.array in self.arrays else None
        what = request.array if level is None else f"level {level}"
        if level not in (None, request.array):
            what += f" (array {request.array})"
        shard = request.row // self._plan.recipe.shard.samples
        return DamagedDataError(
            f"{self.store.where(located.object_name)}: {what} of sample {self._keys[request.row]!r} (shard {shard}, "
            f"row {request.row}, view {request.view}; {located.size} bytes at {located.offset}): {why}; "
            f"run `dtpipe verify --repair {self.store.url}` and extract again"
        )


def _spans(located: Iterable[_Located]) -> Iterator[list[_Located]]:
    """Chunks grouped into ranges to be read at once."""
    span: list[_Located] = []
    for chunk in sorted(located, key=lambda chunk: (chunk.object_name, chunk.offset)):
        if span and not _joins(span, chunk):
            yield span
            span = []
        span.append(chunk)
    if span:
        yield span


def _joins(span: list[_Located], chunk: _Located) -> bool:
    first, end = span[0], span[-1].offset + span[-1].size
    near = chunk.offset - end <= _MERGE_GAP_BYTES and chunk.offset + chunk.size - first.offset <= _MAX_SPAN_BYTES
    return chunk.object_name == first.object_name and near
