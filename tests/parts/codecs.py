"""A codec that nobody would ship: it stores 3 - 2x in place of x, and the 3 beside it, for each row and view.

Whoever computes with its symbols sees levels turned upside down and moved, which no tolerance hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from torch import Tensor

from dtpipe.distill.stream.decode import DECODERS
from dtpipe.extract.shards.codecs import ENCODERS
from dtpipe.manifests.codecs.base import LEVEL_AXES, SYMBOLS, Array, Arrays, Codec, FittedArrays, LevelCodec, PartSpec
from dtpipe.manifests.codecs.fitted import encode_fitted
from dtpipe.manifests.codecs.registry import CODECS
from dtpipe.manifests.schema import CodecSpec, LevelSpec

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


@dataclass(frozen=True)
class FittedLevel:
    """Stores x times a power of two by channel, which lies in a file of its own: nothing is lost."""

    level: LevelSpec
    fitted: FittedArrays

    @property
    def parts(self) -> dict[str, PartSpec]:
        shape = (self.level.channels, self.level.height, self.level.width)
        return {SYMBOLS: PartSpec(np.dtype("<f4"), shape, LEVEL_AXES)}

    @property
    def scale(self) -> np.ndarray:
        return self.fitted.load(self.level.codec.parameters["fitted"])["scale"][:, None, None]

    def encode(self, features: Array) -> dict[str, Array]:
        return {SYMBOLS: features.astype(np.float32) * self.scale}

    def decode(self, parts: Arrays) -> Array:
        return (parts[SYMBOLS] / self.scale).astype(self.level.dtype)

    def error(self, parts: Arrays) -> np.ndarray:
        return np.zeros(parts[SYMBOLS].shape[:-3])


FITTED_CODEC = Codec("fitted", "stores x times a fitted power of two", FittedLevel)


def fit_scales(levels: Sequence[LevelSpec], power: int = 3) -> tuple[tuple[LevelSpec, ...], dict[str, bytes]]:
    """Levels under the codec `fitted`, and the files that they name."""
    files, coded = {}, []
    for level in levels:
        digest, data = encode_fitted({"scale": np.full(level.channels, 2.0**power, np.float32)})
        files[digest] = data
        coded.append(level.model_copy(update={"codec": CodecSpec(name="fitted", parameters={"fitted": digest})}))
    return tuple(coded), files


CODEC = Codec("turned", "stores 3 - 2x in place of x", lambda level, _fitted: TurnedLevel(level))


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
