"""Codecs: rounding as numpy does it, and refusals that name level and sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dtpipe.manifests.codecs.base import decode_level, encode_level, find_codec, stored_dtype
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import CodecRecipe, LevelSpec

CAST = CodecRecipe()


def level(dtype: str = "float16") -> LevelSpec:
    """A level of 2 channels on 3 by 4 cells."""
    return LevelSpec(name="l3", stride=8, channels=2, height=3, width=4, dtype=dtype, tap="up.2")  # type: ignore[arg-type]


@given(arrays(np.float32, (2, 2, 3, 4), elements=st.floats(-60000, 60000, width=32)))
def test_float16_is_within_half_a_step(values: np.ndarray) -> None:
    stored = encode_level(values, level(), CAST)
    assert stored.dtype == np.float16
    back = decode_level(stored, level(), CAST).astype(np.float64)
    step = np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)  # 11 significant bits; subnormals are 2^-24 apart
    assert (np.abs(back - values) <= step).all()


@given(arrays(np.float32, (1, 2, 3, 4), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_float32_is_exact(values: np.ndarray) -> None:
    np.testing.assert_array_equal(
        decode_level(encode_level(values, level("float32"), CAST), level("float32"), CAST), values
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_level_and_sample(value: float) -> None:
    values = np.zeros((1, 2, 3, 4), np.float32)
    values[0, 1, 2, 3] = value
    with pytest.raises(TeacherError, match=r"level l3 of sample 'a/b\.png': 1 of 24 features are not finite"):
        encode_level(values, level(), CAST, "a/b.png")


def test_overflow_of_float16_is_refused_and_float32_takes_it() -> None:
    values = np.full((1, 2, 3, 4), 70000.0, np.float32)
    with pytest.raises(ConfigError, match=r"level l3 of sample 'k': 7e\+04 does not fit float16; .*dtype=float32"):
        encode_level(values, level(), CAST, "k")
    assert encode_level(values, level("float32"), CAST).max() == 70000


def test_other_shapes_dtypes_and_codecs_are_refused() -> None:
    with pytest.raises(ShapeError, match="l3"):
        encode_level(np.zeros((1, 2, 4, 3), np.float32), level(), CAST)
    with pytest.raises(ShapeError, match="l3"):
        decode_level(np.zeros((1, 2, 3, 4), np.float32), level(), CAST)
    with pytest.raises(ConfigError, match="codec 'nf4' is unknown; choose one of cast"):
        find_codec(CodecRecipe(name="nf4"))
    assert stored_dtype(level(), CAST) == np.dtype("<f2")
