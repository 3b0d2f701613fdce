"""`int8`: each channel of a sample as 255 equal steps from its least to its largest value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import LEVEL_AXES, SYMBOLS, Array, Arrays, Codec, FittedArrays, LevelCodec, PartSpec
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec

INT8: Final = "int8"
SCALE: Final = "scale"  # part: of each channel the step, and the value of symbol 0
LARGEST: Final = 127  # symbol
_ROUNDED: Final = 2.0**-22  # of a channel's largest value: what float32 rounds away, in scale, offset and sum
_SUBNORMAL: Final = 2.0**-126  # and what it has no steps for


@dataclass(frozen=True)
class Int8Level:
    """Symbols are -127 to 127, (C, H, W)."""

    level: LevelSpec

    @cached_property
    def parts(self) -> dict[str, PartSpec]:
        """Symbols, and (2, C): steps and offsets."""
        shape = (self.level.channels, self.level.height, self.level.width)
        return {
            SYMBOLS: PartSpec(np.dtype("i1"), shape, LEVEL_AXES),
            SCALE: PartSpec(np.dtype("<f4"), (2, self.level.channels), ("scale", "channel")),
        }

    def encode(self, features: Array) -> dict[str, Array]:
        """To the nearest step, of equally near ones the even. A channel of one value has step 0."""
        values = features.astype(np.float64)
        least, most = values.min(axis=(-2, -1)), values.max(axis=(-2, -1))
        scale = np.stack([(most - least) / (2 * LARGEST), (most + least) / 2], axis=-2).astype("<f4")
        too_large = np.abs(values).max(axis=(-3, -2, -1)) > np.finfo(self.level.dtype).max
        scale[too_large] = np.inf  # says that these features do not fit
        step, offset = (scale[..., row, :, None, None].astype(np.float64) for row in (0, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            steps = np.where(step > 0, (values - offset) / step, 0)
        symbols = np.clip(np.rint(np.nan_to_num(steps)), -LARGEST, LARGEST)
        return {SYMBOLS: symbols.astype("i1"), SCALE: scale}

    def decode(self, parts: Arrays) -> Array:
        """symbol * step + offset, in float32."""
        scale = parts[SCALE].astype(np.float32, copy=False)
        step, offset = (scale[..., row, :, None, None] for row in (0, 1))
        with np.errstate(over="ignore"):  # beyond the largest number by rounding, which the cast takes back
            return _cast(parts[SYMBOLS].astype(np.float32) * step + offset, self.level.dtype)

    def error(self, parts: Arrays) -> NDArray[np.float64]:
        """Half a step of each channel, and what is rounded away in float32 and in the level's dtype."""
        scale = parts[SCALE].astype(np.float64)
        step, offset = scale[..., 0, :], np.abs(scale[..., 1, :])
        largest = offset + LARGEST * step
        most = np.nextafter(
            np.finfo(self.level.dtype).max, 0, dtype=self.level.dtype
        )  # the next one's step is the same
        rounded = np.spacing(np.minimum(largest, most).astype(self.level.dtype)).astype(np.float64) / 2
        worst = step / 2 + largest * _ROUNDED + _SUBNORMAL + rounded
        return np.asarray(np.sqrt(np.square(worst).mean(axis=-1)))


def _cast(values: NDArray[np.float32], dtype: str) -> Array:
    """The nearest value that the dtype has, at most its largest."""
    most = np.finfo(dtype).max
    return np.clip(values, -most, most).astype(dtype)


def _open(level: LevelSpec, _fitted: FittedArrays) -> LevelCodec:
    if level.codec.parameters:
        raise ConfigError(
            f"codec int8 of level {level.name} takes no parameters, found {sorted(level.codec.parameters)}"
        )
    if level.role == "soft_labels":
        raise ConfigError(f"codec int8 of level {level.name} is for features; store soft labels under cast or topk")
    return Int8Level(level)


CODEC = Codec(INT8, "8 bits a value, with a scale and an offset for each channel of a sample", _open)
