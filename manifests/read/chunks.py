"""Reading chunks so that no wrong byte gets through. The same code for both stores.

One rule: the entry decides. A chunk's bytes are compared with the size and crc32c of its entry before they are decoded,
so a flipped byte, a truncated, missing, stale or swapped object fails at the first chunk that is touched. Where many
chunks are read, compiled code (`native`) does all of this at once, and what it does not find as expected is read again
here, chunk by chunk, which says what is wrong.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.fitted import StoredFitted
from dtpipe.manifests.errors import DamagedDataError, DtpipeError
from dtpipe.manifests.layout.arrays import ArraySpec, crc32c, stored_arrays
from dtpipe.manifests.layout.coding import plain_coding
from dtpipe.manifests.read import native
from dtpipe.manifests.read.located import ChunkRequest, LocatedChunks, locate_chunks
from dtpipe.manifests.read.places import ChunkTable, StoredObjects
from dtpipe.manifests.schema import Plan
from dtpipe.manifests.store.cache import ObjectCache
from dtpipe.manifests.store.open_files import OpenFile, OpenFiles
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.shard import SHARD_FORMATS

NATIVE_FROM = 64  # chunks: who reads fewer in all does not wait for compiled code to load
_PIECE_BYTES = 32 * 2**20  # held at once by a thread, of objects that are no files
_REMOTE_THREADS = 4
Keys = Sequence[str] | Mapping[int, str]
"""By row, for messages."""


@dataclass(frozen=True)
class _Chunk:
    """One chunk, where it is looked at alone."""

    array: str
    row: int
    view: int
    out: NDArray[np.generic]
    object_name: str
    offset: int
    size: int  # with the trailer
    crc32c: int
    as_stored: bool  # or decoded


class ChunkReader:
    """Reads and decodes chunks with a few threads; picklable, and usable after a fork."""

    def __init__(self, store: Store, plan: Plan, tables: Mapping[str, ChunkTable], keys: Keys) -> None:
        self.store, self.tables, self._plan, self._keys = store, tables, plan, keys
        self.arrays: dict[str, ArraySpec] = stored_arrays(plan.recipe, StoredFitted(store))
        self._kind = SHARD_FORMATS[plan.recipe.shard.format]
        codings = {name: plain_coding(spec, plan.recipe) for name, spec in self.arrays.items()}
        self._codings = native.Codings(codings, self._kind.trailer_bytes)
        self.cache: ObjectCache | None = None
        """Where objects of a remote store are kept as files."""
        self._files, self._num_read = OpenFiles(), 0
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_kind": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kind = SHARD_FORMATS[self._plan.recipe.shard.format]

    def keep_in(self, cache: ObjectCache) -> None:
        """Keep objects of a remote store as files."""
        self.cache = cache
        cache.claim(self._objects.digests.to_pylist())

    def read(self, requests: Sequence[ChunkRequest]) -> None:
        """Fill the `out` of every request; neighbouring chunks are read as one range.

        Raises: DamagedDataError naming shard, array, sample and object, or the file that a level was fitted with.
        """
        requests = [request for request in requests if len(request.rows)]
        if not requests:
            return
        for request in requests:
            load = self.arrays[request.array].tables if request.array in self.arrays else None
            if load is not None:
                load()  # here, where it is no fault of a chunk
        chunks = locate_chunks(self.tables, requests, self._kind.trailer_bytes)
        self._num_read += len(chunks)
        fast = self._num_read >= NATIVE_FROM and native.available()
        with _share_of_cores() as num_cores:
            num = num_cores if self.store.local else _REMOTE_THREADS
            self._read_pieces(requests, chunks.cut(num, None if self._has_files else _PIECE_BYTES), fast)

    def _read_pieces(self, requests: Sequence[ChunkRequest], pieces: Sequence[LocatedChunks], fast: bool) -> None:
        first, others = pieces[0], pieces[1:]
        running = [self._threads().submit(self._read_piece, requests, piece, fast) for piece in others]
        try:
            self._read_piece(requests, first, fast)
        finally:
            for piece in running:
                piece.exception()  # nothing may write into `out` once this has returned
        for piece in running:
            piece.result()

    def packed_request(self, array: str, rows: NDArray[np.int64], views: NDArray[np.int64]) -> ChunkRequest:
        """For chunks as they are stored, one behind the other in the order of `rows`."""
        size = self.tables[array].places(rows, views)[2].astype(np.int64)
        ends = np.cumsum(size)
        return ChunkRequest(array, rows, views, np.empty(int(size.sum()), np.uint8), ends - size)

    def read_bytes(self, array: str, row: int, view: int = 0) -> bytes:
        """The checked bytes of one chunk, not decoded."""
        request = ChunkRequest(array, np.array([row]), np.array([view]), np.empty((1, 0)))
        chunk = self._chunk([request], locate_chunks(self.tables, [request], self._kind.trailer_bytes), 0)
        return self._checked(chunk, self._fetch(chunk))[0]

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            num = max(_num_threads(), _REMOTE_THREADS)
            self._pool = os.getpid(), ThreadPoolExecutor(num, thread_name_prefix="dtpipe-chunks")
        return self._pool[1]

    def _read_piece(self, requests: Sequence[ChunkRequest], chunks: LocatedChunks, fast: bool) -> None:
        if fast and self._has_files:
            chunks = chunks.take(~self._read_files(requests, chunks))
        for span in chunks.spans() if len(chunks) else ():
            self._read_span(requests, span, fast)

    def _read_files(self, requests: Sequence[ChunkRequest], chunks: LocatedChunks) -> NDArray[np.bool_]:
        """Which chunks were read whole, straight from their files."""
        begins = np.ones(len(chunks), np.bool_)
        begins[1:] = chunks.object_idx[1:] != chunks.object_idx[:-1]  # those of one object lie together
        files = [self._file(object_idx) for object_idx in chunks.object_idx[begins].tolist()]
        descriptors = np.array([-1 if file is None else file.descriptor for file in files], np.int32)
        descriptor = descriptors[np.cumsum(begins) - 1]
        opened: NDArray[np.bool_] = descriptor >= 0
        opened[opened] = self._codings.read(requests, chunks.take(opened), descriptor[opened], chunks.offset[opened])
        return opened

    @property
    def _has_files(self) -> bool:
        """Whether objects can be had as files."""
        return self.store.local is not None or self.cache is not None

    def _file(self, object_idx: int) -> OpenFile | None:
        """An object as a file; None where it cannot be opened, of which those say more who read it otherwise."""
        if self.cache is not None:
            return self._files.get(object_idx, lambda: self._kept(object_idx))
        try:
            return self._files.get(object_idx, lambda: self.store.open(self._object_name(object_idx)))
        except DtpipeError:
            return None

    def _kept(self, object_idx: int) -> OpenFile | None:
        """An object of a remote store, in the cache; None where it has no room."""
        assert self.cache is not None
        name, objects = self._object_name(object_idx), self._objects
        return self.cache.open(
            str(objects.digests[object_idx]),
            int(objects.sizes[object_idx]),
            lambda ranges: self.store.read_ranges([(name, offset, size) for offset, size in ranges]),
        )

    def _read_span(self, requests: Sequence[ChunkRequest], span: LocatedChunks, fast: bool) -> None:
        object_idx, start = int(span.object_idx[0]), int(span.offset[0])
        size = int((span.offset + span.size).max()) - start
        kept = self._from_cache(object_idx, start, size)
        data = self._from_store(object_idx, start, size) if kept is None else kept
        if data is not None and fast:
            span = span.take(~self._read_memory(requests, span, data))
        for idx in range(len(span)):
            chunk = self._chunk(requests, span, idx)
            here = chunk.offset - start
            try:
                self._decode(chunk, self._fetch(chunk) if data is None else data[here : here + chunk.size])
            except DamagedDataError:
                if kept is None:
                    raise
                self._forget(object_idx)  # what is kept is damaged, which says nothing of the dataset
                self._decode(chunk, self._fetch(chunk))

    def _from_store(self, object_idx: int, start: int, size: int) -> bytes | None:
        """Bytes of an object; None where it ends before: chunks are then read one by one, to name what is hit."""
        try:
            return self.store.read_range(self._object_name(object_idx), start, size)
        except DamagedDataError:
            return None

    def _from_cache(self, object_idx: int, start: int, size: int) -> bytes | None:
        """The same of an object that is kept as a file; None where none is, or none that can be read."""
        file = self._file(object_idx) if self.cache is not None else None
        if file is None:
            return None
        with contextlib.suppress(OSError):
            data = file.read(start, size)
            if len(data) == size:
                return data
        self._forget(object_idx)
        return None

    def _read_memory(self, requests: Sequence[ChunkRequest], span: LocatedChunks, data: bytes) -> NDArray[np.bool_]:
        """Which chunks were read whole, out of the bytes from where the first one begins."""
        source = np.frombuffer(data, np.uint8).ctypes.data + span.offset - span.offset[0]
        return self._codings.read(requests, span, np.full(len(span), -1, np.int32), source)

    def _object_name(self, object_idx: int) -> str:
        return str(self._objects.names[object_idx])

    @property
    def _objects(self) -> StoredObjects:
        return next(iter(self.tables.values())).objects

    def _forget(self, object_idx: int) -> None:
        file = self._files.forget(object_idx)
        if self.cache is not None and file is not None:
            self.cache.drop(str(self._objects.digests[object_idx]), file)

    def _chunk(self, requests: Sequence[ChunkRequest], chunks: LocatedChunks, idx: int) -> _Chunk:
        request, item = requests[chunks.request[idx]], int(chunks.item[idx])
        out, size = request.out, int(chunks.size[idx])
        if request.starts is not None:
            start = int(request.starts[item])
            out = out[start : start + size - self._kind.trailer_bytes]
        return _Chunk(
            request.array,
            int(request.rows[item]),
            int(request.views[item]),
            out[item, ...] if request.starts is None else out,
            self._object_name(int(chunks.object_idx[idx])),
            int(chunks.offset[idx]),
            size,
            int(chunks.crc32c[idx]),
            request.starts is not None,
        )

    def _fetch(self, chunk: _Chunk) -> bytes:
        try:
            return self.store.read_range(chunk.object_name, chunk.offset, chunk.size)
        except DamagedDataError as err:
            raise self._damaged(chunk, str(err).split(";")[0]) from err

    def _checked(self, chunk: _Chunk, data: bytes) -> tuple[bytes, bytes]:
        """Chunk and trailer. Raises: DamagedDataError when the chunk is not the one of the entry."""
        size = chunk.size - self._kind.trailer_bytes
        content = data[:size]
        if crc32c(content) != chunk.crc32c:
            raise self._damaged(
                chunk, "its bytes are not those of the manifest (crc32c differs): damaged, stale or swapped"
            )
        return content, data[size:]

    def _decode(self, chunk: _Chunk, data: bytes) -> None:
        content, trailer = self._checked(chunk, data)
        if chunk.as_stored:
            if trailer not in (b"", chunk.crc32c.to_bytes(4, "little")):
                raise self._damaged(chunk, "its stored checksum differs")
            chunk.out[...] = np.frombuffer(content, np.uint8)
            return
        try:
            self._kind.decode(self.arrays[chunk.array], content, trailer, chunk.out)
        except DamagedDataError as err:
            raise self._damaged(chunk, str(err)) from err

    def _damaged(self, chunk: _Chunk, why: str) -> DamagedDataError:
        level = self.arrays[chunk.array].level if chunk.array in self.arrays else None
        what = chunk.array if level is None else f"level {level}"
        if level not in (None, chunk.array):
            what += f" (array {chunk.array})"
        shard = chunk.row // self._plan.recipe.shard.samples
        return DamagedDataError(
            f"{self.store.where(chunk.object_name)}: {what} of sample {self._keys[chunk.row]!r} (shard {shard}, "
            f"row {chunk.row}, view {chunk.view}; {chunk.size} bytes at {chunk.offset}): {why}; "
            f"run `dtpipe verify --repair {self.store.url}` and extract again"
        )


_reading: dict[int, set[int]] = {}  # by process, since a fork begins anew: its threads that are in a read


@contextlib.contextmanager
def _share_of_cores() -> Iterator[int]:
    """Cores for one read: all over the number of reads that are going on, at least one."""
    own, threads = threading.get_ident(), _reading.setdefault(os.getpid(), set())
    threads.add(own)
    try:
        yield max(1, _num_threads() // len(threads))
    finally:
        threads.discard(own)


def _num_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
