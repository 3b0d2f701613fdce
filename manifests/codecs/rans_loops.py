"""The loops of `rans`, compiled; imported only where something is coded.

One rule: a decoder reads and writes nowhere but in its chunk and its row, whatever the bytes are, and its loops end
with the symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from dtpipe.manifests.codecs.rans import ESCAPE, LEAST, PRECISION, REACH, TOTAL

_RENORMALISE = 32 - PRECISION


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when first called, outside Python's lock; kept on disk where that can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for compiled code
        return numba.njit(nogil=True)(function)


@_loop
def encode_chunk(symbols: Any, classes: Any, frequencies: Any, starts: Any, lanes: Any, out: Any) -> Any:
    """Write a chunk to the end of `out`, large enough for any; returns where it starts."""
    num, end = len(symbols), len(out)
    escapes = 0
    for idx in range(num):
        symbol = np.int64(symbols[idx])
        if abs(symbol) > REACH or frequencies[classes[idx], symbol + REACH] == 0:
            escapes += 1
            out[end - escapes] = symbol & 255
    states, at = np.full(lanes, LEAST, np.int64), end - escapes
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


@_loop
def decode_chunks(data: Any, starts: Any, ends: Any, entries: Any, classes: Any, lanes: Any, out: Any) -> Any:
    """Decode each chunk into its row of `out`; returns the first that cannot be one, or -1."""
    num, states = len(classes), np.empty(lanes, np.uint32)
    for chunk in range(len(starts)):
        at, end = starts[chunk], ends[chunk]
        if end - at < 4 * lanes:
            return chunk
        for lane in range(lanes):
            state = np.uint32(0)
            for byte in range(4):
                state |= np.uint32(data[at + byte]) << np.uint32(8 * byte)
            states[lane] = state
            at += 4
        lane = 0
        for idx in range(num):
            state = states[lane]
            entry = entries[classes[idx], state & np.uint32(TOTAL - 1)]
            place = np.int64(entry & np.uint32(63))
            state = ((entry >> np.uint32(6)) & np.uint32(8191)) * (state >> np.uint32(PRECISION)) + (
                entry >> np.uint32(19)
            )
            if state < np.uint32(LEAST):
                if at + 2 > end:
                    return chunk
                state = (state << np.uint32(16)) | (np.uint32(data[at]) | (np.uint32(data[at + 1]) << np.uint32(8)))
                at += 2
            states[lane] = state
            if place == ESCAPE:
                end -= 1
                if at > end:
                    return chunk
                out[chunk, idx] = np.int8(data[end])
            else:
                out[chunk, idx] = place - REACH
            lane = lane + 1 if lane + 1 < lanes else 0
        if at != end:
            return chunk
        for lane in range(lanes):
            if states[lane] != np.uint32(LEAST):
                return chunk
    return -1
