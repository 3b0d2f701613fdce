"""Our codecs for zarr-python, which finds them by the entry points of the installed package, and reads as usual.

One rule: nothing of dtpipe imports this; what it says must be what `zarr` writes and reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from zarr.abc.codec import ArrayArrayCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from dtpipe.manifests.layout.prediction import predicted, restore
from dtpipe.manifests.layout.zarr import PREDICTED_CODEC


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
