"""The loop of `native`, compiled by numba: imported only once its C functions are registered.

One rule: whatever is not exactly as expected ends that chunk with False, and nothing is said of why.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numba import types

from dtpipe.manifests.compiled import compiled
from dtpipe.manifests.read.functions import SYMBOL_PREFIX

_BLOCK_BYTES = 256 * 2**10  # read and summed up at a time, while it is in a core's cache
_MOST_SMALL = 4096  # bytes of a lead and a trailer
_INT32, _INT64, _UINT32, _WORD = (cast(Any, kind) for kind in (types.int32, types.int64, types.uint32, types.uintp))


def _function(name: str, signature: Any) -> Any:
    """A C function. Sizes and addresses are words."""
    return types.ExternalFunction(SYMBOL_PREFIX + name, signature)


_extend = _function("crc32c_extend", _UINT32(_UINT32, _WORD, _WORD))
_new_context = _function("ZSTD_createDCtx", _WORD())
_free_context = _function("ZSTD_freeDCtx", _WORD(_WORD))
_decompress = _function("ZSTD_decompressDCtx", _WORD(_WORD, _WORD, _WORD, _WORD, _WORD))
_preadv = _function("preadv", _INT64(_INT32, _WORD, _INT32, _INT64))
_copy = _function("memcpy", _WORD(_WORD, _WORD, _WORD))
_compare = _function("memcmp", _INT32(_WORD, _WORD, _WORD))


@compiled()
def _fetch(
    descriptor: Any, offset: Any, small: Any, lead_bytes: Any, to: Any, num_bytes: Any, trailer_bytes: Any, vectors: Any
) -> Any:
    """crc32c of a chunk in a file, -1 where the file ends before: lead and trailer go to `small`, the rest to `to`."""
    total, done = _UINT32(0), 0
    while True:
        take = min(_BLOCK_BYTES, num_bytes - done)
        lead = lead_bytes if done == 0 else 0
        trailer = trailer_bytes if done + take == num_bytes else 0
        vectors[0], vectors[1] = small, lead
        vectors[2], vectors[3] = to + done, take
        vectors[4], vectors[5] = small + lead_bytes, trailer
        if _preadv(_INT32(descriptor), _WORD(vectors.ctypes.data), _INT32(3), offset) != lead + take + trailer:
            return -1
        total = _extend(total, _WORD(small), _WORD(lead))
        total = _extend(total, _WORD(to + done), _WORD(take))
        done, offset = done + take, offset + lead + take
        if done == num_bytes:
            return np.int64(total)


@compiled(
    "void(int32[::1], int64[::1], int64[::1], uint32[::1], int64[::1], int64[::1], boolean[::1], int64[::1],"
    " int64[::1], int64, boolean[::1])"
)
def read_chunks(
    descriptor: Any,
    source: Any,
    size: Any,
    crc32c: Any,
    out: Any,
    out_bytes: Any,
    zstd: Any,
    lead: Any,
    lead_bytes: Any,
    trailer_bytes: Any,
    whole: Any,
) -> None:
    """As `ChunkBlock.read`, into `whole`."""
    most = 0
    for idx in range(len(size)):
        if zstd[idx] and descriptor[idx] >= 0:
            most = max(most, size[idx])
    packed, small, vectors = np.empty(most, np.uint8), np.empty(_MOST_SMALL, np.uint8), np.empty(6, np.int64)
    context = _new_context()
    for idx in range(len(size)):
        num_bytes = size[idx] - lead_bytes[idx]
        if num_bytes < 0 or (num_bytes != out_bytes[idx] and not zstd[idx]):
            continue
        if descriptor[idx] < 0:
            begins = source[idx]
            content, trailer = begins + lead_bytes[idx], begins + size[idx]
            total = np.int64(_extend(_UINT32(0), _WORD(begins), _WORD(size[idx])))
        else:
            begins = small.ctypes.data
            content, trailer = (packed.ctypes.data if zstd[idx] else out[idx]), begins + lead_bytes[idx]
            total = _fetch(
                descriptor[idx], source[idx], begins, lead_bytes[idx], content, num_bytes, trailer_bytes, vectors
            )
        if (
            total != np.int64(crc32c[idx])
            or _compare(_WORD(trailer), _WORD(crc32c.ctypes.data + 4 * idx), _WORD(trailer_bytes)) != 0
            or _compare(_WORD(begins), _WORD(lead[idx]), _WORD(lead_bytes[idx])) != 0
        ):
            continue
        if zstd[idx]:
            size_out = _decompress(context, _WORD(out[idx]), _WORD(out_bytes[idx]), _WORD(content), _WORD(num_bytes))
            whole[idx] = size_out == _WORD(out_bytes[idx])
        else:
            if descriptor[idx] < 0:
                _copy(_WORD(out[idx]), _WORD(content), _WORD(num_bytes))
            whole[idx] = True
    _free_context(context)
