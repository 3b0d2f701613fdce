"""The other half of `transform`: from coefficients to small integers in the order of their bands, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.basis import Floats

NO_BAND: Final = 255  # of coefficients that are not stored: they are 0
MAX_BANDS: Final = 254
LARGEST_NUMBER: Final = 127 * 256 + 127  # magnitude of a symbol of two bytes


@dataclass(frozen=True)
class Quantiser:
    """One step for all coefficients; how values go to it, by band."""

    step: float
    band: NDArray[np.uint8]
    """(K, H, W): the band of each coefficient, or `NO_BAND`."""
    zone: NDArray[np.float32]
    """(B,): below so many steps a value is 0."""
    rounding: NDArray[np.float32]
    """(B,): any other magnitude is floor(steps + rounding), at least 1."""
    shift: NDArray[np.float32]
    """(B, 2): a symbol stands for its magnitude less this many steps; for magnitude 1, for larger ones."""

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(n,): which coefficients are stored, by band, within a band as they lie."""
        flat = self.band.ravel()
        order = np.argsort(flat, kind="stable")
        return order[: int((flat != NO_BAND).sum())]

    @cached_property
    def bands(self) -> NDArray[np.uint8]:
        """(n,): the band of each symbol, rising."""
        return self.band.ravel()[self.order]

    def quantise(self, coefficients: Floats | NDArray[np.float32]) -> NDArray[np.int16]:
        """To whole numbers in the order of bands. Shapes: [.., K, H, W] -> [.., n]."""
        values = np.take(coefficients.reshape(*coefficients.shape[:-3], -1), self.order, axis=-1)
        steps = np.abs(values) / self.step
        magnitude = np.clip(np.floor(steps + self.rounding[self.bands]), 1, LARGEST_NUMBER)
        return np.asarray(np.copysign(np.where(steps < self.zone[self.bands], 0, magnitude), values), np.int16)

    def restore(self, numbers: NDArray[np.int16]) -> Floats:
        """The coefficients that whole numbers stand for. Shapes: [.., n] -> [.., K, H, W]."""
        values = numbers.astype(np.float64)
        larger = (np.abs(values) > 1).astype(np.int64)
        points = values - np.sign(values) * self.shift[self.bands, larger]
        flat = np.zeros((*numbers.shape[:-1], self.band.size))
        flat[..., self.order] = points * self.step
        return flat.reshape(*numbers.shape[:-1], *self.band.shape)


def to_symbols(numbers: NDArray[np.int16], wide: int) -> NDArray[np.int8]:
    """Bytes of numbers: number = symbol + 256 * second, where only the first `wide` have a second, behind all others.

    Numbers too large for their bytes become the largest that fit. Shapes: [.., n] -> [.., n + wide].
    """
    narrow = np.clip(numbers[..., wide:], -127, 127).astype(np.int8)
    first = numbers[..., :wide].astype(np.int8)  # modulo 256
    second = ((numbers[..., :wide].astype(np.int32) - first) >> 8).astype(np.int8)
    return np.concatenate([first, narrow, second], axis=-1)


def from_symbols(symbols: NDArray[np.int8], wide: int) -> NDArray[np.int16]:
    """Numbers of bytes. Shapes: [.., n + wide] -> [.., n]."""
    num = symbols.shape[-1] - wide
    numbers = symbols[..., :num].astype(np.int16)
    numbers[..., :wide] += 256 * symbols[..., num:].astype(np.int16)
    return numbers
