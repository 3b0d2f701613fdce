"""Reading, checking and decoding many chunks in one call, without Python's lock: compiled code over the C libraries
that the packages google-crc32c and numcodecs bring with them.

One rule: nothing here says what is wrong. A chunk that is not exactly as expected is only marked, for `chunks` to read
it again by itself, which names it. Where a library is not found, all chunks are read so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.layout.coding import ChunkCoding
from dtpipe.manifests.read.functions import register_functions
from dtpipe.manifests.read.located import ChunkRequest, LocatedChunks
from dtpipe.manifests.store.open_files import ProcessLock

_loading = ProcessLock()


@dataclass(frozen=True)
class ChunkBlock:
    """Some chunks, by column. Shapes: each [n].

    A chunk's bytes are `lead_bytes` that are known, then the array's, plain or as a zstd frame; behind them, in some
    stores, its checksum stands again as a trailer. Chunks of other coders are read as plain ones.
    """

    descriptor: NDArray[np.int32]
    """Open file to read from; -1 where `source` is an address."""
    source: NDArray[np.int64]
    """Where the chunk begins: in its file, or in memory."""
    size: NDArray[np.int64]
    """Bytes without the trailer."""
    crc32c: NDArray[np.uint32]
    out: NDArray[np.int64]
    """Address that the array is written to."""
    out_bytes: NDArray[np.int64]
    zstd: NDArray[np.bool_]
    lead: NDArray[np.int64]
    """Address of the bytes that it must begin with."""
    lead_bytes: NDArray[np.int64]

    def take(self, chosen: NDArray[np.bool_]) -> ChunkBlock:
        """Some of them."""
        return ChunkBlock(*(np.ascontiguousarray(column[chosen]) for column in self.__dict__.values()))

    def read(self, trailer_bytes: int) -> NDArray[np.bool_]:
        """Fill what the addresses of `out` name. Who calls keeps the files and all this memory meanwhile.

        Shapes: -> [n], False for each chunk that is not as expected, whose array is then anything.
        """
        run, whole = _kernel(), np.zeros(len(self.size), np.bool_)
        assert run is not None, "ask `available` before"
        run(*self.__dict__.values(), trailer_bytes, whole)
        return whole


class Codings:
    """How the chunks of a dataset's arrays are coded, as far as they can be read here; picklable."""

    def __init__(self, codings: Mapping[str, ChunkCoding | None], trailer_bytes: int) -> None:
        self._codings = {name: coding for name, coding in codings.items() if coding is not None}
        self._unfinished = {name for name, coding in self._codings.items() if coding.predicted or coding.tables}
        self._leads = {name: np.frombuffer(coding.lead, np.uint8) for name, coding in self._codings.items()}
        self._trailer_bytes = trailer_bytes

    def read(
        self,
        requests: Sequence[ChunkRequest],
        chunks: LocatedChunks,
        descriptor: NDArray[np.int32],
        source: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Read the chunks that can be read here, from files or memory as `ChunkBlock` has it.

        Shapes: all [n] -> [n], True for each that is as expected and was decoded.
        """
        table = np.array([self._columns(request) for request in requests], np.int64)
        columns = np.ascontiguousarray(table[chunks.request].T)
        out, out_bytes, zstd, lead, lead_bytes, known, coded, as_stored = columns
        whole: NDArray[np.bool_] = known.astype(np.bool_)
        size = chunks.size - self._trailer_bytes
        ends = np.cumsum(np.where(coded, size, 0))
        symbols = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)  # chunks of rans as they are stored
        goes_to = np.where(coded, symbols.ctypes.data + ends - size, out + chunks.item * out_bytes)
        for idx, request in enumerate(requests):
            if request.starts is not None:
                here = chunks.request == idx
                goes_to[here] = out[here] + request.starts[chunks.item[here]]
        block = ChunkBlock(
            descriptor,
            source,
            size,
            chunks.crc32c,
            goes_to,
            np.where(coded | as_stored, size, out_bytes),
            zstd.astype(np.bool_),
            lead,
            lead_bytes,
        )
        block = block if whole.all() else block.take(whole)
        whole[whole] = block.read(self._trailer_bytes)
        for idx, request in enumerate(requests):
            if request.array not in self._unfinished:
                continue
            chosen = np.flatnonzero(whole & (chunks.request == idx))
            items = np.ascontiguousarray(chunks.item[chosen])
            whole[chosen] = self._finish(request, items, symbols, (ends - size)[chosen], ends[chosen])
        return whole

    def _finish(
        self,
        request: ChunkRequest,
        items: NDArray[np.int64],
        symbols: NDArray[np.uint8],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Pixels in place of residuals, and symbols of their chunks, of `items` that were read. Shapes: all [n]."""
        coding = self._codings[request.array]
        if coding.predicted:
            from dtpipe.manifests.layout.prediction import restore

            restore(request.out.view(np.uint8), items)
        if coding.tables is not None and request.starts is None:
            from dtpipe.manifests.codecs.rans import decode_chunks

            return decode_chunks(symbols, starts, ends, coding.tables(), items, request.out.view(np.int8))
        return np.ones(len(items), np.bool_)

    def _columns(self, request: ChunkRequest) -> tuple[int, ...]:
        coding = self._codings.get(request.array)
        if coding is None:
            return (0,) * 8
        out, lead = request.out, self._leads[request.array]
        assert out.flags.c_contiguous, "arrays are written to by address"
        if request.starts is not None:
            return out.ctypes.data, 0, False, 0, 0, True, False, True
        coded = coding.tables is not None
        return out.ctypes.data, out[0].nbytes, coding.zstd, lead.ctypes.data, len(lead), True, coded, False


def available() -> bool:
    """Whether chunks can be read so on this machine. The first call takes a second, of a new installation three."""
    with _loading:
        return _kernel() is not None


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., None] | None:
    if not register_functions():
        return None
    from dtpipe.manifests.read.kernel import read_chunks

    return read_chunks
