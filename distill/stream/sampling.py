"""Which rows an epoch holds, and how often: a pure function of (seed, epoch, key).

A row with weight 2.3 comes twice in every epoch and a third time in three epochs of ten. The number of rows of an epoch
is always the same: of rows of one weight, the fraction with the smallest hashes is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.engine.seeds import mix

_Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]
_FRACTION = np.uint64(0x5A3C6B1D2E4F7081)  # keeps this hash apart from the one that picks views


@dataclass(frozen=True)
class Sampling:
    """The rows that are trained on and their passes per epoch.

    An entry stands for one pass over one row: row + pass * num_rows, int64, where num_rows counts all of the source.
    """

    rows: _Rows
    num_rows: int
    weights: NDArray[np.float64] | None = None
    """Passes per epoch by row of `rows`; None: one each."""
    _groups: list[tuple[float, _Rows]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        groups = [(1.0, self.rows)]
        if self.weights is not None:
            groups = [(float(weight), self.rows[self.weights == weight]) for weight in np.unique(self.weights)]
        object.__setattr__(self, "_groups", groups)

    @property
    def max_passes(self) -> int:
        """The most often that an epoch can hold one row."""
        return max(math.ceil(weight) for weight, _ in self._groups)

    @property
    def epoch_size(self) -> int:
        """Entries per epoch, the same for all."""
        return sum(len(rows) * math.floor(weight) + _num_extra(weight, rows) for weight, rows in self._groups)

    def entries(self, hashes: Hashes, seed: int, epoch: int) -> _Rows:
        """The entries of one epoch, before they are permuted; `hashes` are those of the keys, by row of the source."""
        parts = []
        for weight, rows in self._groups:
            whole = math.floor(weight)
            parts += [rows + idx * self.num_rows for idx in range(whole)]
            if count := _num_extra(weight, rows):
                drawn = mix(
                    hashes[rows]
                    ^ mix(np.array([seed % 2**64], np.uint64) ^ _FRACTION)
                    ^ mix(mix(np.array([epoch], np.uint64)))
                )
                chosen = np.sort(np.argsort(drawn, kind="stable")[:count])
                parts.append(rows[chosen] + whole * self.num_rows)
        return np.concatenate(parts)

    def split(self, entries: _Rows) -> tuple[_Rows, _Rows]:
        """Row, and number of the pass, of each entry."""
        passes, rows = np.divmod(entries, self.num_rows)
        return rows, passes


def pass_hashes(hashes: Hashes, passes: _Rows) -> Hashes:
    """Hashes for what chance decides per pass: the key's own in the first, another one in each further pass."""
    return np.where(passes == 0, hashes, mix(hashes ^ mix(passes.astype(np.uint64))))


def _num_extra(weight: float, rows: _Rows) -> int:
    return round((weight - math.floor(weight)) * len(rows))
