"""A codec that nobody would ship: it stores 3 - 2x in place of x, and the 3 beside it, for each row and view.

Whoever computes with its symbols sees levels turned upside down and moved, which no tolerance hides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from torch import Tensor

from dtpipe.distill.stream.decode import DECODERS
from dtpipe.extract.shards.codecs import ENCODERS
from dtpipe.manifests.codecs.base import LEVEL_AXES, SYMBOLS, Array, Arrays, Codec, LevelCodec, PartSpec
from dtpipe.manifests.codecs.registry import CODECS
from dtpipe.manifests.schema import LevelSpec

THREE = "three"


@dataclass(frozen=True)
class TurnedLevel:
    level: LevelSpec

    @property
    def parts(self) -> dict[str, PartSpec]:
        shape = (self.level.channels, self.level.height, self.level.width)
        return {SYMBOLS: PartSpec(np.dtype("<f4"), shape, LEVEL_AXES), THREE: PartSpec(np.dtype("<f4"), (), ())}

    def encode(self, features: Array) -> dict[str, Array]:
        symbols = np.float32(3) - np.float32(2) * features.astype(np.float32)
        return {SYMBOLS: symbols, THREE: np.full(features.shape[:-3], 3, np.float32)}

    def decode(self, parts: Arrays) -> Array:
        features = (parts[THREE][..., None, None, None] - parts[SYMBOLS]) / np.float32(2)
        return features.astype(self.level.dtype)

    def error(self, parts: Arrays) -> np.ndarray:
        steps = np.spacing(np.abs(parts[SYMBOLS])) / 4 + np.spacing(np.abs(self.decode(parts))).astype(np.float64)
        return np.sqrt(np.square(steps).mean(axis=(-3, -2, -1)))


CODEC = Codec("turned", "stores 3 - 2x in place of x", TurnedLevel)


def encode_turned(codec: LevelCodec, features: Tensor) -> dict[str, Tensor]:
    """As `TurnedLevel.encode`, where the teacher runs."""
    return {SYMBOLS: 3 - 2 * features.float(), THREE: features.new_full(features.shape[:-3], 3).float()}


def decode_turned(codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    """As `TurnedLevel.decode`, where the student is trained."""
    features = (parts[THREE][..., None, None, None] - parts[SYMBOLS]) / 2
    return features.half() if codec.level.dtype == "float16" else features


def register_turned(monkeypatch: pytest.MonkeyPatch, on_device: bool = True) -> None:
    """Make it known during one test; without `on_device`, to the reference alone."""
    monkeypatch.setitem(CODECS, CODEC.name, CODEC)
    if on_device:
        monkeypatch.setitem(ENCODERS, CODEC.name, encode_turned)
        monkeypatch.setitem(DECODERS, CODEC.name, decode_turned)
