"""The static tables of `rans`: how often each symbol is expected, by class; what a sample costs under them; and the
same as JSON, for readers that have no file of fitted arrays.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError

Coder = Literal["zstd", "rans"]
"""How the chunks of an array become bytes: by zstd, which any reader knows, or by the tables of its codec."""
PRECISION: Final = 12  # bits of a frequency
TOTAL: Final = 2**PRECISION
REACH: Final = 31  # symbols -31 to 31 have a place; others take the last, and a byte of their own
PLACES: Final = 2 * REACH + 2
ESCAPE: Final = PLACES - 1
_MOST_LANES: Final = 32
_SYMBOLS_OF_A_LANE: Final = 2048  # a lane costs about two bytes, and is to be worth them
_PRIOR: Final = 8.0  # symbols: how much a smooth distribution weighs in a table


@dataclass(frozen=True)
class RansTables:
    """What coder and decoder know before."""

    frequencies: NDArray[np.uint16]
    """(T, 64): of -31 to 31 and the escape, summing up to 4096; that of the escape is never 0."""
    classes: NDArray[np.uint8]
    """(n,): the table of each symbol of a chunk."""

    def __post_init__(self) -> None:
        sums = self.frequencies.astype(np.int64).sum(axis=1)
        if self.frequencies.shape[1:] != (PLACES,) or (sums != TOTAL).any() or (self.frequencies[:, ESCAPE] == 0).any():
            raise ConfigError(f"tables of rans have {PLACES} frequencies each that sum up to {TOTAL}; found {sums[:8]}")
        if self.classes.max(initial=0) >= max(len(sums), 1):
            raise ConfigError(f"a symbol of rans is of table {self.classes.max(initial=0)}, and there are {len(sums)}")

    @property
    def lanes(self) -> int:
        """How many states take turns: a power of two, more where there are more symbols."""
        return min(_MOST_LANES, 1 << max(0, (len(self.classes) // _SYMBOLS_OF_A_LANE).bit_length() - 1))

    @cached_property
    def starts(self) -> NDArray[np.uint16]:
        """(T, 64): the sum of the frequencies before."""
        ends = np.cumsum(self.frequencies, axis=1, dtype=np.int64)
        return np.asarray(ends - self.frequencies, np.uint16)

    @cached_property
    def entries(self) -> NDArray[np.uint32]:
        """(T, 4096): place, frequency * 2^6 and distance from the start * 2^19 of each remainder of a state."""
        entries = np.empty((len(self.frequencies), TOTAL), np.uint32)
        for row, frequencies, starts in zip(entries, self.frequencies.astype(np.int64), self.starts, strict=True):
            place = np.repeat(np.arange(PLACES), frequencies)
            row[:] = place | frequencies[place] << 6 | (np.arange(TOTAL) - starts[place]) << 19
        return entries


def tables_to_json(tables: RansTables) -> dict[str, Any]:
    """`frequencies`: base64 of those of all tables, uint16, little-endian; `counts`: symbols of each table, in whose
    order they lie.
    """
    assert (np.diff(tables.classes.astype(np.int64)) >= 0).all(), "symbols lie in the order of their tables"
    counts = np.bincount(tables.classes, minlength=len(tables.frequencies))
    return {
        "frequencies": base64.b64encode(tables.frequencies.astype("<u2").tobytes()).decode(),
        "counts": counts.tolist(),
    }


def tables_from_json(fields: Mapping[str, Any]) -> RansTables:
    """The inverse of `tables_to_json`. Raises: ConfigError for what it does not make."""
    try:
        frequencies = np.frombuffer(base64.b64decode(fields["frequencies"], validate=True), "<u2")
        counts = [int(count) for count in fields["counts"]]
        classes = np.repeat(np.arange(len(counts)), counts).astype(np.uint8)
        return RansTables(frequencies.reshape(len(counts), PLACES).astype(np.uint16), classes)
    except (KeyError, TypeError, ValueError, binascii.Error) as err:
        raise ConfigError(
            f"tables of rans are base64 of {PLACES} numbers each, and a count of symbols for each; found other fields "
            f"({err})"
        ) from err


def fit_tables(symbols: NDArray[np.int8], classes: NDArray[np.uint8], num_tables: int) -> RansTables:
    """Tables of the frequencies in a sample. Shapes: symbols [N, n], classes [n].

    A symbol and its negative count the same, and where there are few, a table leans on the two-sided geometric
    distribution of its mean magnitude.
    """
    counts = np.zeros((num_tables, 256))
    for row in symbols:  # one by one, for indices are eight times as large
        np.add.at(counts, (classes, row.astype(np.int64) + 128), 1)
    counts[:, 1:] = (counts[:, 1:] + counts[:, :0:-1]) / 2
    return RansTables(np.stack([_frequencies(row) for row in counts]), classes)


def _frequencies(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Whole frequencies of a table. Shapes: counts of -128 to 127 [256] -> [64]."""
    magnitudes = np.abs(np.arange(-128, 128))
    mean = float(counts @ magnitudes) / max(counts.sum(), 1) + 1e-3
    smooth = (mean / (1 + np.sqrt(1 + mean**2))) ** magnitudes  # whose mean magnitude is that
    shares = counts + _PRIOR * smooth / smooth.sum()
    shares *= TOTAL / shares.sum()
    near = shares[128 - REACH : 128 + REACH + 1]
    kept = np.where(near < 0.5, 0, np.maximum(np.rint(near), 1)).astype(np.int64)
    escape = max(1, round(float(TOTAL - near[kept > 0].sum())))
    frequencies = np.append(kept, escape)
    frequencies[frequencies.argmax()] += TOTAL - frequencies.sum()  # less than the largest of 64 has
    return frequencies.astype(np.uint16)


def expected_bytes(symbols: NDArray[np.int8], tables: RansTables) -> float:
    """Mean size of the chunks of a sample by the entropy of its symbols under the tables. Shapes: symbols [N, n]."""
    bits = PRECISION - np.log2(np.maximum(tables.frequencies, 2.0**-20))
    taken, num_escapes = np.empty(symbols.shape), 0
    for of_row, row in zip(taken, symbols.astype(np.int16), strict=True):
        places = np.where(np.abs(row) <= REACH, row + REACH, ESCAPE)
        places = np.where(tables.frequencies[tables.classes, places] == 0, ESCAPE, places)
        of_row[...] = bits[tables.classes, places]
        num_escapes += int((places == ESCAPE).sum())
    return float((taken.sum() + 8 * num_escapes) / 8 / max(len(symbols), 1)) + 2.5 * tables.lanes
