"""What a codec is: which arrays a level becomes, encoding, decoding, and how far decoded features may be from the
true ones.

One rule: what a codec stores are symbols, and only its `decode` turns them into features. numpy is the reference;
encoders and decoders for a device (`extract.shards.codecs`, `distill.stream.decode`) are proven equal to it. zstd and
checksums come after a codec and are the stores' affair. A codec is a file here that declares `CODEC`, and its line in
`registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.fit import Fit, FitTarget, OnStep, go_on
from dtpipe.manifests.codecs.rans_tables import RansTables
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import LevelSpec
from dtpipe.manifests.words import count_of

Array = NDArray[np.generic]
Arrays = Mapping[str, Array]

SYMBOLS = ""  # name of the part that holds the level itself; others are what decoding needs beside it, such as `scale`
LEVEL_AXES = ("channel", "y", "x")


@dataclass(frozen=True)
class PartSpec:
    """One of the arrays that a level becomes."""

    dtype: np.dtype[np.generic]
    """Little-endian."""
    shape: tuple[int, ...]
    """Of one row and view."""
    axes: tuple[str, ...]
    """Names of these axes."""
    tables: Callable[[], RansTables] | None = field(default=None, compare=False)
    """Loads what its chunks become bytes by, under the coder `rans`; None: the coder `zstd`. Picklable."""
    sparse: bool = False
    """Mostly 0, so that a high level of zstd makes fewer bytes of it."""


class FittedArrays(Protocol):
    """Where codecs find the arrays that they were fitted with; picklable, for any thread."""

    def load(self, digest: str) -> Arrays:
        """The arrays of one fit, by name; read when first asked for.

        Raises: MissingObjectError, DamagedDataError when they are not those that were fitted.
        """
        ...


class LevelCodec(Protocol):
    """A codec set up for one level; picklable.

    Features are [..., C, H, W], and the arrays of their parts have the same leading axes: rows, or rows and views.
    Each of these is coded by itself, so that any of them can be read alone.
    """

    @property
    def level(self) -> LevelSpec: ...

    @property
    def parts(self) -> Mapping[str, PartSpec]:
        """The arrays that the level becomes, by part; `SYMBOLS` is always among them."""
        ...

    def encode(self, features: Array) -> dict[str, Array]:
        """Finite features to parts. Float parts that are not finite say that these features cannot be stored."""
        ...

    def decode(self, parts: Arrays) -> Array:
        """Parts to features, in the level's dtype."""
        ...

    def error(self, parts: Arrays) -> NDArray[np.float64]:
        """How far what `decode` gives may be from what `encode` was given: root mean square over C, H and W.

        Shapes: parts of [..., C, H, W] -> [...].
        """
        ...


class FitLevel(Protocol):
    """Looks at raw features [N, C, H, W] of a sample, and gives what chooses parameters and arrays for a target."""

    def __call__(self, level: LevelSpec, features: Array, on_step: OnStep = go_on, /) -> Callable[[FitTarget], Fit]:
        """`on_step` is called for each sample and for each try, then and later.

        Raises: ConfigError for features that it cannot be fitted on; what `on_step` raises.
        """
        ...


@dataclass(frozen=True)
class Codec:
    """One way to store levels."""

    name: str
    summary: str
    """One sentence for `dtpipe list codecs`."""
    open: Callable[[LevelSpec, FittedArrays], LevelCodec]
    """Sets it up for a level by `level.codec.parameters`, which say all about `parts`; loads what it was fitted with
    when that is first needed. Raises: ConfigError for parameters it cannot use."""
    fit: FitLevel | None = None
    """None where nothing is fitted."""


def array_name(level: str, part: str) -> str:
    """Name of a stored array: `l2` holds symbols, `l2_scale` what a codec keeps beside them."""
    return level if part == SYMBOLS else f"{level}_{part}"


def parts_of(codec: LevelCodec, arrays: Arrays) -> dict[str, Array]:
    """The parts of a codec's level, out of arrays by their stored names."""
    return {part: arrays[array_name(codec.level.name, part)] for part in codec.parts}


def are_finite(parts: Arrays) -> bool:
    """False when features did not fit their codec."""
    return all(np.isfinite(values).all() for values in parts.values() if values.dtype.kind == "f")


def encode_level(codec: LevelCodec, features: Array, sample: str = "") -> dict[str, Array]:
    """One sample's features as they are stored; `sample` is its key, for messages.

    Shapes: [V, C, H, W] (any leading axes) -> {part: [V, *its shape]}.
    Raises: ShapeError; TeacherError on NaN or infinity; ConfigError when finite values do not fit the codec.
    """
    level, shape = codec.level, _shape(codec.level)
    of = f"level {codec.level.name}" + (f" of sample {sample!r}" if sample else "")
    if features.shape[-3:] != shape:
        raise ShapeError(f"{of} is {list(features.shape)}, the recipe says [.., {', '.join(map(str, shape))}]")
    if not np.isfinite(features).all():
        count = int(features.size - np.isfinite(features).sum())
        raise TeacherError(
            f"{of}: {count} of {count_of(features.size, 'feature')} not finite; use float32 in the teacher"
        )
    parts = codec.encode(features)
    if not are_finite(parts):
        largest = float(np.abs(features).max())
        raise ConfigError(
            f"{of}: {largest:.4g} does not fit {level.dtype}; extract with -s extract.shard.dtype=float32"
        )
    return parts


def decode_level(codec: LevelCodec, parts: Arrays) -> Array:
    """Features from stored parts. Shapes: {part: [..., *its shape]} -> [..., C, H, W], in the level's dtype.

    Raises: ShapeError on other parts, shapes or dtypes than the codec says.
    """
    for part, spec in codec.parts.items():
        values, name = parts[part], array_name(codec.level.name, part)
        if values.shape[values.ndim - len(spec.shape) :] != spec.shape or values.dtype != spec.dtype:
            raise ShapeError(
                f"array {name} is {values.dtype}{list(values.shape)}, the recipe says {spec.dtype}{list(spec.shape)}"
            )
    features = codec.decode(parts)
    assert features.shape[-3:] == _shape(codec.level), "a codec gives the shape of its level"
    assert features.dtype == codec.level.dtype, "a codec gives the dtype of its level"
    return features


def _shape(level: LevelSpec) -> tuple[int, int, int]:
    return level.channels, level.height, level.width
