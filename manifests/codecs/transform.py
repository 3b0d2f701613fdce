"""`transform`: features in a basis where few numbers say most, and these in equal steps.

Each sample is normalised by its own mean and deviation, which are stored, so that raw features come back. Then come the
discrete cosine transform over the map, for each region of frequencies a fitted basis over channels (Karhunen-Loeve),
and one step for all coefficients, with a dead zone around 0 and points of reconstruction. Coefficients of like spread
are a band, and symbols lie in the order of bands; coefficients that are always 0 are not stored.

One rule: what a sample lost is measured when it is encoded and stored with it, so that none is worse than it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import SYMBOLS, Array, Arrays, Codec, FittedArrays, LevelCodec, PartSpec
from dtpipe.manifests.codecs.basis import ChannelBasis, normalise
from dtpipe.manifests.codecs.fitted import FITTED
from dtpipe.manifests.codecs.quantise import NO_BAND, Quantiser, from_symbols, to_symbols
from dtpipe.manifests.codecs.rans_tables import PLACES, Coder, RansTables
from dtpipe.manifests.codecs.transform_fit import fit_transform, symbol_classes
from dtpipe.manifests.errors import ConfigError, DamagedDataError
from dtpipe.manifests.schema import LevelSpec

TRANSFORM: Final = "transform"
NORM: Final = "norm"  # part: deviation and mean of the sample, and the root mean square of what it lost
ROUNDED: Final = {"float32": 2.0**-20, "float16": 2.0**-14}
"""Of a sample's root mean square: what decoders that sum in float32 may round otherwise, by the level's dtype."""


_MOST_TABLES: Final = 32
_tables: dict[TransformParameters, RansTables] = {}  # of this process


@dataclass(frozen=True)
class TransformParameters:
    """What a recipe says of a level; the arrays are those of the digest."""

    fitted: str
    components: int
    """K: rows of the basis of the region that has most."""
    symbols: int
    """Coefficients that are stored, of a row and view."""
    wide: int
    """How many of these, the first, take two bytes."""
    step: float
    """Of coefficients of normalised features."""
    entropy: Coder
    """How the symbols become bytes."""


@dataclass(frozen=True)
class TransformLevel:
    """Symbols are a row of bytes; see `Quantiser` and `to_symbols`."""

    level: LevelSpec
    parameters: TransformParameters
    arrays: FittedArrays

    @property
    def parts(self) -> dict[str, PartSpec]:
        """Symbols in the order of bands, and (deviation, mean, error) of the sample."""
        num = self.parameters.symbols + self.parameters.wide
        tables = self.load_tables if self.parameters.entropy == "rans" else None
        return {
            SYMBOLS: PartSpec(np.dtype("i1"), (num,), ("coefficient",), tables, sparse=True),
            NORM: PartSpec(np.dtype("<f4"), (3,), ("norm",)),
        }

    @cached_property
    def basis(self) -> ChannelBasis:
        """Loaded and checked at the first use. Raises: DamagedDataError; what `FittedArrays.load` raises."""
        arrays = self._arrays
        unit, centre = (arrays[name].astype(np.float32) for name in ("unit", "centre"))
        ranks, region = arrays["ranks"].astype(np.int32), arrays["region"].astype(np.uint8)
        return ChannelBasis(arrays["basis"].astype(np.int8), unit, ranks, region, centre)

    @cached_property
    def quantiser(self) -> Quantiser:
        """As `basis`."""
        arrays = self._arrays
        floats = (arrays[name].astype(np.float32) for name in ("zone", "rounding", "shift"))
        return Quantiser(self.parameters.step, arrays["band"].astype(np.uint8), *floats)

    def load_tables(self) -> RansTables:
        """Of the symbols, for the coder `rans`; kept by what was fitted, for stores open codecs often. Raises: as
        `basis`.
        """
        key = self.parameters
        if key not in _tables:
            frequencies, classes = self._arrays["frequencies"], symbol_classes(self.quantiser, key.wide)
            while len(_tables) >= _MOST_TABLES:
                _tables.pop(next(iter(_tables)), None)
            _tables[key] = RansTables(frequencies.astype(np.uint16), classes)
        return _tables[key]

    def encode(self, features: Array) -> dict[str, Array]:
        """In float64. The sample's norm is infinite where features do not fit the level's dtype."""
        values = features.astype(np.float64)
        normal, norm = normalise(values)
        numbers = self.quantiser.quantise(self.basis.forward(normal))
        parts: dict[str, Array] = {SYMBOLS: to_symbols(numbers, self.parameters.wide)}
        parts[NORM] = np.concatenate([norm, norm[..., :1]], axis=-1).astype("<f4")
        lost = self.decode(parts).astype(np.float64) - values
        axes = (-3, -2, -1)
        size = np.sqrt(np.square(values).mean(axis=axes))
        error = np.sqrt(np.square(lost).mean(axis=axes)) + size * ROUNDED[self.level.dtype]
        with np.errstate(over="ignore"):
            parts[NORM][..., 2] = np.nextafter(error.astype(np.float32), np.float32(np.inf))
        parts[NORM][np.abs(values).max(axis=axes) > np.finfo(self.level.dtype).max] = np.inf
        return parts

    def decode(self, parts: Arrays) -> Array:
        """Cut to the range of the level's dtype."""
        deviation, mean = (parts[NORM][..., place, None, None, None].astype(np.float64) for place in (0, 1))
        numbers = from_symbols(parts[SYMBOLS].astype(np.int8, copy=False), self.parameters.wide)
        normal = self.basis.inverse(self.quantiser.restore(numbers))
        most = np.finfo(self.level.dtype).max
        return np.clip(normal * deviation + mean, -most, most).astype(self.level.dtype)

    def error(self, parts: Arrays) -> NDArray[np.float64]:
        """As it was measured when encoding."""
        return np.asarray(parts[NORM][..., 2], np.float64)

    @cached_property
    def _arrays(self) -> Arrays:
        arrays = self.arrays.load(self.parameters.fitted)
        wrong = _faults(self.level, self.parameters, arrays)
        if wrong:
            raise DamagedDataError(
                f"fitted arrays {self.parameters.fitted[:12]} of level {self.level.name}: {'; '.join(wrong)}; "
                "they are not those that the dataset was made with"
            )
        return arrays


def _faults(level: LevelSpec, parameters: TransformParameters, arrays: Arrays) -> list[str]:
    """Where arrays are not what the parameters say; no symbol can then lead beyond them."""
    components, bands, ranks = parameters.components, len(arrays.get("zone", ())), arrays.get("ranks", np.zeros(0))
    rows, cells = int(ranks.sum()), (level.height, level.width)
    shapes: Mapping[str, tuple[str, tuple[int, ...]]] = {
        "basis": ("int8", (rows, level.channels)),
        "unit": ("float32", (rows,)),
        "ranks": ("int32", (len(ranks),)),
        "region": ("uint8", cells),
        "centre": ("float32", (level.channels,)),
        "band": ("uint8", (components, *cells)),
        "zone": ("float32", (bands,)),
        "rounding": ("float32", (bands,)),
        "shift": ("float32", (bands, 2)),
        "frequencies": ("uint16", (bands + 1, PLACES)),
    }
    wrong = [
        f"{name} should be {dtype}{list(shape)}"
        for name, (dtype, shape) in shapes.items()
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].shape != shape
    ]
    if wrong:
        return wrong
    if not len(ranks) or ranks.min() < 0 or ranks.max() != components or arrays["region"].max() >= len(ranks):
        wrong.append(f"regions up to {arrays['region'].max()} have the ranks {ranks.tolist()}")
    coded = arrays["band"][arrays["band"] != NO_BAND]
    if coded.size != parameters.symbols or coded.max(initial=0) >= max(bands, 1):
        wrong.append(f"band has {coded.size} coefficients up to band {coded.max(initial=0)} of {bands}")
    if not all(np.isfinite(arrays[name]).all() for name in ("unit", "centre", "zone", "rounding", "shift")):
        wrong.append("not all values are finite")
    return wrong


def _open(level: LevelSpec, fitted: FittedArrays) -> LevelCodec:
    given: dict[str, Any] = dict(level.codec.parameters)
    names = {"components": int, "symbols": int, "wide": int, "step": float, "entropy": str, FITTED: str}
    if given.keys() != names.keys() or any(type(given[name]) is not kind for name, kind in names.items()):
        raise ConfigError(
            f"codec transform of level {level.name} takes {', '.join(names)}, which a fit gives; found {given}"
        )
    parameters = TransformParameters(**given)
    most = level.channels * level.height * level.width
    if (
        not 0 <= parameters.components <= level.channels
        or not 0 <= parameters.wide <= parameters.symbols <= most
        or not 0 < parameters.step < np.inf
        or parameters.entropy not in get_args(Coder)
    ):
        raise ConfigError(f"codec transform of level {level.name} cannot have {given}; fit it again")
    return TransformLevel(level, parameters, fitted)


CODEC = Codec(
    TRANSFORM,
    "a fitted basis over channels and cosines over the map, in steps for a target error",
    _open,
    fit_transform,
)
