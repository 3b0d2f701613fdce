"""Arrays of any content, for what must come back bit by bit."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st


def any_bits(dtype: type[np.generic], shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Every NaN included; nothing is drawn in vain."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return st.binary(min_size=size, max_size=size).map(lambda bits: np.frombuffer(bits, dtype).reshape(shape))


def assert_same_bits(found: np.ndarray, truth: np.ndarray) -> None:
    np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(truth).view(np.uint8))
