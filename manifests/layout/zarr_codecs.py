"""Our codecs for zarr-python, which finds them by the entry points of the installed package, and reads as usual.

One rule: nothing of dtpipe imports this; what it says must be what `zarr` writes and reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from dtpipe.manifests.codecs.rans import compress, decompress
from dtpipe.manifests.codecs.rans_tables import RansTables, tables_from_json, tables_to_json
from dtpipe.manifests.layout.prediction import predicted, restore
from dtpipe.manifests.layout.zarr import PREDICTED_CODEC, RANS_CODEC


@dataclass(frozen=True)
class PredictedCodec(ArrayArrayCodec):
    """Images as residuals, of which `prediction` says what they are. Shapes: [.., H, W, 3] uint8, both ways."""

    is_fixed_size = True

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        parse_named_configuration(data, PREDICTED_CODEC, require_configuration=False)
        return cls()

    def to_dict(self) -> dict[str, JSON]:
        return {"name": PREDICTED_CODEC}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:  # noqa: ARG002
        return input_byte_length

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> NDBuffer:
        images = np.asarray(chunk_array.as_numpy_array(), np.uint8)
        residuals = predicted(images.reshape(-1, *images.shape[-3:]))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(residuals.reshape(images.shape))

    async def _decode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> NDBuffer:
        pixels = np.array(chunk_array.as_numpy_array(), np.uint8, order="C")
        restore(pixels.reshape(-1, *pixels.shape[-3:]))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels)


@dataclass(frozen=True)
class RansCodec(ArrayBytesCodec):
    """One row of symbols under static tables, which `rans_tables` has as JSON. Shapes: [.., n] int8, of one row."""

    tables: RansTables
    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Raises: ConfigError for a configuration that holds no tables."""
        _, configuration = parse_named_configuration(data, RANS_CODEC)
        return cls(tables_from_json(configuration))

    def to_dict(self) -> dict[str, JSON]:
        return {"name": RANS_CODEC, "configuration": tables_to_json(self.tables)}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        symbols = np.asarray(chunk_array.as_numpy_array(), np.int8).ravel()
        return chunk_spec.prototype.buffer.from_bytes(compress(symbols, self.tables))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        """Raises: DamagedDataError for bytes that are none of these tables."""
        symbols = decompress([chunk_bytes.to_bytes()], self.tables)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(symbols.reshape(chunk_spec.shape))
