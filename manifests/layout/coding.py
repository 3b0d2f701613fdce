"""How the bytes of a chunk follow from its array, where that is plain enough for readers to decode many at once.

One rule: this is a second account of what `decode` of a store undoes, and each store's `decode` stays the reference.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dtpipe.manifests.codecs.rans_tables import RansTables
from dtpipe.manifests.layout.arrays import ArraySpec
from dtpipe.manifests.schema import IMAGE, Recipe


@dataclass(frozen=True)
class ChunkCoding:
    """`lead`, then the array's bytes in C order, as they are or as one zstd frame; or its symbols under rans."""

    zstd: bool
    lead: bytes = b""
    predicted: bool = False
    """Whether these bytes are residuals, to be restored."""
    tables: Callable[[], RansTables] | None = None
    """Of the coder rans; nothing else is then done."""


def plain_coding(spec: ArraySpec, recipe: Recipe) -> ChunkCoding | None:
    """Of the chunks of one array; None where they are coded in another way."""
    if spec.tables is not None:
        return ChunkCoding(zstd=False, tables=spec.tables)
    if recipe.shard.format == "zarr":
        return ChunkCoding(zstd=spec.zstd_level > 0, predicted=spec.image_coding == "predicted")
    return None if spec.name == IMAGE else ChunkCoding(zstd=False, lead=_npy_header(spec))


def _npy_header(spec: ArraySpec) -> bytes:
    sink = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(spec.dtype), "fortran_order": False, "shape": spec.chunk_shape}
    np.lib.format.write_array_header_1_0(sink, header)
    return sink.getvalue()
