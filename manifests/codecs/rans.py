"""Entropy coding of symbols by static tables: interleaved rANS, of which each chunk is decoded by itself.

Each symbol has a class, and each class a table of frequencies; both are known before, so a chunk holds no header: the
final states of its lanes (uint32 each), 16-bit words, and at the end, backwards, a byte for each symbol that its table
has no place for. Symbol i goes through lane i modulo the number of lanes, and all lanes share the words.

A lane's state is x, 2^16 <= x < 2^32, at first 2^16. Coding a symbol of frequency f that lies at s in its table: while
x >= f * 2^20, the low 16 bits of x become a word and x is shifted down by them; then x = 4096 * (x // f) + x % f + s.
Coding goes from the last symbol to the first, decoding forwards. A chunk whose lanes do not end at 2^16, or that is not
used up, is damaged.

One rule: a decoder reads and writes nowhere but in its chunk and its row, whatever the bytes are, and its loops end
with the symbols. This module compiles loops: it is imported only where something is coded.

Source: Duda, arXiv 1311.2540 (rANS); Giesen, arXiv 1402.3392 (interleaving). Little-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.rans_tables import ESCAPE, PRECISION, REACH, TOTAL, RansTables
from dtpipe.manifests.compiled import compiled
from dtpipe.manifests.errors import ConfigError, DamagedDataError

_LEAST = 2**16  # of a state
_RENORMALISE = 32 - PRECISION


@compiled()
def _encode_chunk(symbols: Any, classes: Any, frequencies: Any, starts: Any, lanes: Any, out: Any) -> Any:
    """Write a chunk to the end of `out`, large enough for any; returns where it starts."""
    num, end = len(symbols), len(out)
    escapes = 0
    for idx in range(num):
        symbol = np.int64(symbols[idx])
        if abs(symbol) > REACH or frequencies[classes[idx], symbol + REACH] == 0:
            escapes += 1
            out[end - escapes] = symbol & 255
    states, at = np.full(lanes, _LEAST, np.int64), end - escapes
    for idx in range(num - 1, -1, -1):
        table, symbol = classes[idx], np.int64(symbols[idx])
        place = symbol + REACH if abs(symbol) <= REACH else ESCAPE
        if frequencies[table, place] == 0:
            place = ESCAPE
        frequency, state = np.int64(frequencies[table, place]), states[idx & (lanes - 1)]
        if state >= frequency << _RENORMALISE:
            at -= 2
            out[at], out[at + 1] = state & 255, (state >> 8) & 255
            state >>= 16
        states[idx & (lanes - 1)] = ((state // frequency) << PRECISION) + state % frequency + starts[table, place]
    for lane in range(lanes - 1, -1, -1):
        at -= 4
        for byte in range(4):
            out[at + byte] = (states[lane] >> (8 * byte)) & 255
    return at


@compiled()
def _decode_chunk(data: Any, at: Any, end: Any, entries: Any, classes: Any, states: Any, out: Any) -> Any:
    """Decode the chunk of some bytes of `data` into `out`; False where it cannot be one."""
    lanes = len(states)
    if end - at < 4 * lanes:
        return False
    for lane in range(lanes):
        state = np.uint32(0)
        for byte in range(4):
            state |= np.uint32(data[at + byte]) << np.uint32(8 * byte)
        states[lane] = state
        at += 4
    lane = 0
    for idx in range(len(classes)):
        state = states[lane]
        entry = entries[classes[idx], state & np.uint32(TOTAL - 1)]
        place = np.int64(entry & np.uint32(63))
        state = ((entry >> np.uint32(6)) & np.uint32(8191)) * (state >> np.uint32(PRECISION)) + (entry >> np.uint32(19))
        if state < np.uint32(_LEAST):
            if at + 2 > end:
                return False
            state = (state << np.uint32(16)) | (np.uint32(data[at]) | (np.uint32(data[at + 1]) << np.uint32(8)))
            at += 2
        states[lane] = state
        if place == ESCAPE:
            end -= 1
            if at > end:
                return False
            out[idx] = np.int8(data[end])
        else:
            out[idx] = place - REACH
        lane = lane + 1 if lane + 1 < lanes else 0
    return at == end and (states == np.uint32(_LEAST)).all()


@compiled()
def _decode_chunks(
    data: Any, starts: Any, ends: Any, entries: Any, classes: Any, lanes: Any, rows: Any, out: Any, whole: Any
) -> None:
    """Decode each chunk into a row of `out`, and say in `whole` whether it was one."""
    states = np.empty(lanes, np.uint32)
    for chunk in range(len(starts)):
        whole[chunk] = _decode_chunk(data, starts[chunk], ends[chunk], entries, classes, states, out[rows[chunk]])


def compress(symbols: NDArray[np.int8], tables: RansTables) -> bytes:
    """The chunk of symbols [n]. Raises: ConfigError for another number of symbols than tables are for."""
    if symbols.shape != tables.classes.shape or symbols.dtype != np.int8:
        raise ConfigError(
            f"rans tables are for {len(tables.classes)} symbols int8, found {symbols.dtype}{symbols.shape}"
        )
    out = np.empty(4 * tables.lanes + 3 * len(symbols), np.uint8)
    start = _encode_chunk(
        np.ascontiguousarray(symbols), tables.classes, tables.frequencies, tables.starts, tables.lanes, out
    )
    return out[start:].tobytes()


def decompress(chunks: Sequence[bytes], tables: RansTables) -> NDArray[np.int8]:
    """Symbols of chunks. Shapes: -> [N, n]. Raises: DamagedDataError naming the first chunk that is none."""
    sizes = np.array([len(chunk) for chunk in chunks], np.int64)
    ends = np.cumsum(sizes)
    return decompress_joined(np.frombuffer(bytearray().join(chunks), np.uint8), ends - sizes, ends, tables)


def decompress_joined(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    tables: RansTables,
    out: NDArray[np.int8] | None = None,
) -> NDArray[np.int8]:
    """Symbols of chunks that lie in one buffer. Shapes: starts, ends [N] -> [N, n].

    Raises: DamagedDataError naming the first chunk that is none, by its place.
    """
    symbols = np.empty((len(starts), len(tables.classes)), np.int8) if out is None else out
    if len(starts) and not (starts.min() >= 0 and (starts <= ends).all() and ends.max() <= len(data)):
        raise DamagedDataError(f"chunks of rans lie at {starts.min()} to {ends.max()} of {len(data)} bytes")
    whole = decode_chunks(data, starts, ends, tables, np.arange(len(starts)), symbols)
    if not whole.all():
        first = int(whole.argmin())
        raise DamagedDataError(f"chunk {first} of {len(starts)} is not what rans makes of these tables: damaged")
    return symbols


def decode_chunks(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    tables: RansTables,
    rows: NDArray[np.int64],
    out: NDArray[np.int8],
) -> NDArray[np.bool_]:
    """Decode chunks, which lie within `data`, into rows of `out` [M, n], without Python's lock.

    Shapes: starts, ends, rows [N] -> [N]: False for each that is no chunk of these tables, whose row is then anything.
    """
    whole = np.zeros(len(starts), np.bool_)
    _decode_chunks(data, starts, ends, tables.entries, tables.classes, tables.lanes, rows, out, whole)
    return whole
