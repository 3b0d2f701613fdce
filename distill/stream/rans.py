"""Symbols out of the chunks of `rans` on the training device, so that what crosses to it are the stored bytes.

One rule: a program decodes chunks whose lanes fill a warp, a round of lanes at a time; whatever the bytes are, it reads
nowhere but in its chunks and writes nowhere but in their rows. It is proven equal to `manifests.codecs.rans`, symbol by
symbol. This module needs Triton: import it only where that is installed.
"""

# no `annotations` from __future__: Triton looks at those of its function

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dtpipe.manifests.codecs.rans import compress
from dtpipe.manifests.codecs.rans_tables import ESCAPE, REACH, TOTAL, RansTables, fit_tables

_WARP = 32


def _decode(  # type: ignore[no-untyped-def]  # Triton takes no other annotations than these
    data,
    starts,
    ends,
    entries,
    classes,
    out,
    whole,
    num_chunks,
    num,
    lanes: tl.constexpr,
    at_once: tl.constexpr,
    total: tl.constexpr,
    escape: tl.constexpr,
    reach: tl.constexpr,
):
    """Decode `at_once` chunks into their rows of `out`, and say in `whole` which were some."""
    chunk = tl.program_id(0) * at_once + tl.arange(0, at_once)  # [chunks]
    there = chunk < num_chunks
    first = tl.load(starts + chunk, mask=there, other=0)
    last = tl.load(ends + chunk, mask=there, other=0)
    there = there & (last - first >= 4 * lanes)
    lane = tl.arange(0, lanes)[None, :]  # [1, lanes]
    low, high = first[:, None], last[:, None]
    row, fits = chunk.to(tl.int64)[:, None] * num, there[:, None]
    state = tl.zeros((at_once, lanes), tl.int64)
    for byte in tl.static_range(4):
        state += tl.load(data + low + 4 * lane + byte, mask=fits, other=0).to(tl.int64) << (8 * byte)
    at, end = first + 4 * lanes, last  # of the next word, of the last escape
    for begin in range(0, num, lanes):
        idx = begin + lane
        live = fits & (idx < num)
        table = tl.load(classes + idx, mask=idx < num, other=0).to(tl.int64)
        entry = tl.load(entries + table * total + (state & (total - 1)), mask=live, other=0).to(tl.int64) & 0xFFFFFFFF
        place = entry & 63
        after = ((entry >> 6) & 8191) * (state // total) + (entry >> 19)
        needs = (live & (after < 65536)).to(tl.int64)
        word = at[:, None] + 2 * (tl.cumsum(needs, 1) - needs)
        reads = (needs > 0) & (word >= low) & (word + 2 <= high)
        value = tl.load(data + word, mask=reads, other=0).to(tl.int64)
        value += tl.load(data + word + 1, mask=reads, other=0).to(tl.int64) << 8
        state = tl.where(live, tl.where(needs > 0, (after << 16) + value, after), state)
        at += 2 * tl.sum(needs, 1)
        escapes = (live & (place == escape)).to(tl.int64)
        behind = end[:, None] - tl.cumsum(escapes, 1)
        reads = (escapes > 0) & (behind >= low) & (behind < high)
        escaped = tl.load(data + behind, mask=reads, other=0).to(tl.int8)
        symbol = tl.where(escapes > 0, escaped, (place - reach).to(tl.int8))
        tl.store(out + row + idx, symbol, mask=live)
        end -= tl.sum(escapes, 1)
    wrong = tl.sum((state != 65536).to(tl.int64), 1)
    tl.store(whole + chunk, (there & (at == end) & (wrong == 0)).to(tl.int8), mask=chunk < num_chunks)


_KERNEL: Any = triton.jit(_decode)


class DeviceTables:
    """`RansTables` on a device; get them by `device_tables`."""

    def __init__(self, tables: RansTables, device: torch.device) -> None:
        entries = torch.from_numpy(tables.entries.view("i4"))
        self.entries, self.classes = entries.to(device), torch.from_numpy(tables.classes).to(device)
        self.lanes = tables.lanes


_MOST_KEPT = 32
_kept: dict[tuple[int, str], tuple[RansTables, DeviceTables]] = {}  # with what the number is of


def device_tables(tables: RansTables, device: torch.device) -> DeviceTables:
    """Copied there once."""
    key = id(tables), str(device)
    if key not in _kept:
        while len(_kept) >= _MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = tables, DeviceTables(tables, device)
    return _kept[key][1]


def unpack_on_device(data: Tensor, ends: Tensor, tables: DeviceTables) -> tuple[Tensor, Tensor]:
    """Symbols of chunks that lie one behind the other.

    Shapes: data (bytes,) uint8, ends (N,) int64 -> (N, n) int8, (N,) bool: False for each that is no chunk of these
    tables, whose row is then anything.
    """
    num_chunks, num = len(ends), len(tables.classes)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    out = torch.zeros((num_chunks, num), dtype=torch.int8, device=data.device)
    whole = torch.zeros(num_chunks, dtype=torch.int8, device=data.device)
    at_once = _WARP // tables.lanes
    if num_chunks:
        _KERNEL[(triton.cdiv(num_chunks, at_once),)](
            data,
            starts,
            ends,
            tables.entries,
            tables.classes,
            out,
            whole,
            num_chunks,
            num,
            lanes=tables.lanes,
            at_once=at_once,
            total=TOTAL,
            escape=ESCAPE,
            reach=REACH,
            num_warps=1,
        )
    return out, whole.bool()


def try_on_device(device: torch.device) -> None:
    """Decode a chunk of one symbol. Raises: what Triton, its compiler or the driver raise where they cannot."""
    symbol = np.zeros((1, 1), np.int8)
    tables = fit_tables(symbol, np.zeros(1, np.uint8), 1)
    data = torch.frombuffer(bytearray(compress(symbol[0], tables)), dtype=torch.uint8).to(device)
    unpack_on_device(data, torch.tensor([len(data)], device=device), device_tables(tables, device))
