"""`cast`: features rounded to the level's dtype, which is what they are read as."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import LEVEL_AXES, SYMBOLS, Array, Arrays, Codec, FittedArrays, LevelCodec, PartSpec
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec


@dataclass(frozen=True)
class CastLevel:
    """Symbols are the features, float16 or float32."""

    level: LevelSpec

    @cached_property
    def parts(self) -> dict[str, PartSpec]:
        """One array of the level's shape and dtype."""
        shape = (self.level.channels, self.level.height, self.level.width)
        return {SYMBOLS: PartSpec(np.dtype(self.level.dtype).newbyteorder("<"), shape, LEVEL_AXES)}

    def encode(self, features: Array) -> dict[str, Array]:
        """To nearest; infinite where float16 has no such value."""
        with np.errstate(over="ignore"):
            return {SYMBOLS: features.astype(self.parts[SYMBOLS].dtype, copy=False)}

    def decode(self, parts: Arrays) -> Array:
        """The array as it is."""
        return parts[SYMBOLS]

    def error(self, parts: Arrays) -> NDArray[np.float64]:
        """Half the distance of each value to the next larger one."""
        steps = np.spacing(np.abs(parts[SYMBOLS])).astype(np.float64)
        return np.asarray(np.sqrt(np.square(steps / 2).mean(axis=(-3, -2, -1))))


def _open(level: LevelSpec, _fitted: FittedArrays) -> LevelCodec:
    if level.codec.parameters:
        raise ConfigError(
            f"codec cast of level {level.name} takes no parameters, found {sorted(level.codec.parameters)}"
        )
    return CastLevel(level)


CODEC = Codec("cast", "rounds to the level's dtype, float16 or float32", _open)
