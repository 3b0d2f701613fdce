"""`topk`: the k largest logits of each cell with their classes, and one logit for all other classes.

That one logit is chosen so that, at a temperature, the other classes together keep their share of the softened
distribution. No constant is closer to the true one there: by the Kullback-Leibler divergence, the kept classes are then
exact and the share of the others is spread evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import LEVEL_AXES, SYMBOLS, Array, Arrays, Codec, FittedArrays, LevelCodec, PartSpec
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.schema import LevelSpec

TOPK: Final = "topk"
CLASSES: Final = "classes"  # part: which class each kept logit is of, largest first
REST: Final = "rest"  # part: the logit of all other classes
STATED: Final = "error"  # part: root mean square of what the level lost
TEMPERATURE: Final = 4.0  # of label distillation, equation (5)
BEYOND_ROUNDING: Final = 1 + 1e-6  # so that the stated error, as float32, is never below the true one


@dataclass(frozen=True)
class TopkLevel:
    """Symbols are the kept logits in the level's dtype, (k, H, W)."""

    level: LevelSpec
    k: int
    temperature: float = TEMPERATURE

    @cached_property
    def parts(self) -> dict[str, PartSpec]:
        """Kept logits and their classes, the logit of the rest, and the error."""
        dtype, cells = np.dtype(self.level.dtype).newbyteorder("<"), (self.level.height, self.level.width)
        return {
            SYMBOLS: PartSpec(dtype, (self.k, *cells), LEVEL_AXES),
            CLASSES: PartSpec(np.dtype("u1" if self.level.channels <= 256 else "<i2"), (self.k, *cells), LEVEL_AXES),
            REST: PartSpec(dtype, (1, *cells), LEVEL_AXES),
            STATED: PartSpec(np.dtype("<f4"), (1,), ("error",)),
        }

    def encode(self, features: Array) -> dict[str, Array]:
        """Of equal logits the first class is kept. Means are in float64, so that their last bits never show."""
        parts, logits = self.parts, features.astype(np.float64)
        order = np.argsort(-logits, axis=-3, kind="stable")
        ranked = np.take_along_axis(logits, order, axis=-3)
        kept, others = ranked[..., : self.k, :, :], ranked[..., self.k :, :, :]
        largest = others[..., :1, :, :]
        shares = np.exp((others - largest) / self.temperature).mean(axis=-3, keepdims=True)
        with np.errstate(over="ignore"):
            stored: dict[str, Array] = {
                SYMBOLS: kept.astype(parts[SYMBOLS].dtype),
                CLASSES: order[..., : self.k, :, :].astype(parts[CLASSES].dtype),
                REST: (largest + self.temperature * np.log(shares)).astype(parts[REST].dtype),
            }
            lost = self.decode(stored).astype(np.float64) - logits
            error = np.sqrt(np.square(lost).mean(axis=(-3, -2, -1)))[..., None]
        return {**stored, STATED: (error * BEYOND_ROUNDING).astype(parts[STATED].dtype)}

    def decode(self, parts: Arrays) -> Array:
        """The kept logits at their classes, that of the rest elsewhere."""
        kept, classes = parts[SYMBOLS], parts[CLASSES].astype(np.int64)
        if classes.size and not 0 <= classes.min() <= classes.max() < self.level.channels:
            raise ShapeError(
                f"level {self.level.name} has a logit of class {classes.max()}, and {self.level.channels} classes; the "
                "dataset was not written by dtpipe"
            )
        shape = (*kept.shape[:-3], self.level.channels, *kept.shape[-2:])
        logits = np.array(np.broadcast_to(parts[REST], shape))
        np.put_along_axis(logits, classes, kept, axis=-3)
        return logits

    def error(self, parts: Arrays) -> NDArray[np.float64]:
        """As it was measured when encoding."""
        return np.asarray(parts[STATED][..., 0], np.float64)


def _open(level: LevelSpec, _fitted: FittedArrays) -> LevelCodec:
    given = dict(level.codec.parameters)
    k, temperature = given.pop("k", None), given.pop("temperature", TEMPERATURE)
    if level.role != "soft_labels":
        raise ConfigError(f"codec topk of level {level.name} is for soft labels, and the level holds {level.role}")
    if given or not isinstance(k, int) or not isinstance(temperature, int | float) or temperature <= 0:
        raise ConfigError(
            f"codec topk of level {level.name} takes k, a number of classes, and temperature, a number above 0; found "
            f"{level.codec.parameters}"
        )
    if not 1 <= k < level.channels:
        raise ConfigError(
            f"codec topk of level {level.name} is to keep {k} of {level.channels} classes; keep 1 to "
            f"{level.channels - 1}, or all of them under cast"
        )
    return TopkLevel(level, k, float(temperature))


CODEC = Codec(TOPK, "the k largest logits of soft labels with their classes, and one logit for the rest", _open)
