"""Chunks of symbols under the coder `rans`: the same bytes in both stores.

One rule: loops are compiled, so `rans` is imported only where a chunk is coded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.layout.arrays import ArraySpec


def encode_symbols(spec: ArraySpec, chunk: NDArray[np.generic]) -> bytes:
    """The bytes of one chunk. Raises: as the tables' `FittedArrays.load`."""
    from dtpipe.manifests.codecs.rans import compress

    assert spec.tables is not None, "the array is under rans"
    return compress(chunk.astype(np.int8, copy=False), spec.tables())


def decode_symbols(spec: ArraySpec, chunk: bytes) -> NDArray[np.int8]:
    """The symbols of one chunk. Raises: DamagedDataError when it is none of these tables."""
    from dtpipe.manifests.codecs.rans import decompress

    assert spec.tables is not None, "the array is under rans"
    tables = spec.tables()
    try:
        symbols: NDArray[np.int8] = decompress([chunk], tables)[0]
    except DamagedDataError as err:
        raise DamagedDataError("it is not what rans makes of these tables") from err
    return symbols
