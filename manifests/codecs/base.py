"""Codecs of feature levels: from float features to the numbers that are stored, and back. The reference, in numpy.

One rule: a codec is a pure function of one sample's level and the recipe. A codec is one entry in `CODECS`; zstd and
checksums come after it and are the stores' affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import CodecRecipe, LevelSpec

Encode = Callable[[NDArray[np.generic], LevelSpec], NDArray[np.generic]]
Decode = Callable[[NDArray[np.generic], LevelSpec], NDArray[np.generic]]


@dataclass(frozen=True)
class Codec:
    """One way to store levels. Shapes of both functions: [..., C, H, W] -> the same."""

    name: str
    summary: str
    """One sentence for `dtpipe list codecs`."""
    stored_dtype: Callable[[LevelSpec], np.dtype[np.generic]]
    encode: Encode
    decode: Decode


def _float_dtype(level: LevelSpec) -> np.dtype[np.generic]:
    return np.dtype(level.dtype).newbyteorder("<")


def _cast(values: NDArray[np.generic], level: LevelSpec) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):  # overflow is found, with its place, by `encode_level`
        return values.astype(_float_dtype(level), copy=False)


CODECS: dict[str, Codec] = {
    "cast": Codec(
        "cast", "rounds to the level's dtype, float16 or float32", _float_dtype, _cast, lambda stored, _: stored
    ),
}


def find_codec(recipe: CodecRecipe) -> Codec:
    """The codec of a recipe.

    Raises: ConfigError listing the choices.
    """
    if recipe.name not in CODECS:
        raise ConfigError(f"codec {recipe.name!r} is unknown; choose one of {', '.join(sorted(CODECS))}")
    return CODECS[recipe.name]


def stored_dtype(level: LevelSpec, recipe: CodecRecipe) -> np.dtype[np.generic]:
    """Dtype of a level's array in the store, little-endian."""
    return find_codec(recipe).stored_dtype(level)


def encode_level(
    values: NDArray[np.generic], level: LevelSpec, recipe: CodecRecipe, sample: str = ""
) -> NDArray[np.generic]:
    """One sample's features as they are stored; `sample` is its key, for messages.

    Shapes: [V, C, H, W] (any leading axes) -> the same, in the stored dtype.
    Raises: ShapeError; TeacherError on NaN or infinity; ConfigError when finite values overflow the stored dtype.
    """
    codec, shape = find_codec(recipe), (level.channels, level.height, level.width)
    if values.shape[-3:] != shape:
        raise ShapeError(
            f"level {level.name}{_of(sample)} is {list(values.shape)}, the recipe says [.., {', '.join(map(str, shape))}]"
        )
    if not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise TeacherError(
            f"level {level.name}{_of(sample)}: {count} of {values.size} features are not finite; use float32 in the teacher"
        )
    coded = codec.encode(values, level)
    if coded.dtype.kind == "f" and not np.isfinite(coded).all():
        largest = float(np.abs(values).max())
        raise ConfigError(
            f"level {level.name}{_of(sample)}: {largest:.4g} does not fit {coded.dtype}; extract with -s extract.shard.dtype=float32"
        )
    return coded


def decode_level(stored: NDArray[np.generic], level: LevelSpec, recipe: CodecRecipe) -> NDArray[np.generic]:
    """Features from stored numbers. Shapes: [..., C, H, W] -> the same, float16 or float32.

    Raises: ShapeError on another shape or dtype than the recipe says.
    """
    codec, shape = find_codec(recipe), (level.channels, level.height, level.width)
    if stored.shape[-3:] != shape or stored.dtype != codec.stored_dtype(level):
        raise ShapeError(
            f"level {level.name} is {stored.dtype}{list(stored.shape)}, the recipe says {codec.stored_dtype(level)}{list(shape)}"
        )
    return codec.decode(stored, level)


def _of(sample: str) -> str:
    return f" of sample {sample!r}" if sample else ""
