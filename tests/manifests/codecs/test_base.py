"""Codecs: rounding as numpy does it, errors within what is stated, and refusals that name level and sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dtpipe.manifests.codecs.base import SYMBOLS, LevelCodec, decode_level, encode_level
from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import CodecSpec, LevelSpec


def codec(dtype: str = "float16", **spec: object) -> LevelCodec:
    """Of a level of 2 channels on 3 by 4 cells."""
    fields = {"name": "l3", "stride": 8, "channels": 2, "height": 3, "width": 4, "dtype": dtype, "tap": "up.2"}
    return open_codec(LevelSpec.model_validate({**fields, **spec}))


@given(arrays(np.float32, (2, 2, 3, 4), elements=st.floats(-60000, 60000, width=32)))
def test_float16_is_within_half_a_step_and_within_the_stated_error(values: np.ndarray) -> None:
    parts = encode_level(codec(), values)
    assert parts[SYMBOLS].dtype == np.dtype("<f2")
    distance = np.abs(decode_level(codec(), parts).astype(np.float64) - values)
    step = np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)  # 11 significant bits; subnormals are 2^-24 apart
    assert (distance <= step).all()
    stated = codec().error(parts)
    assert stated.shape == (2,)
    assert (np.sqrt(np.square(distance).mean(axis=(1, 2, 3))) <= stated).all()
    assert (stated <= 2 * np.sqrt(np.square(step).mean(axis=(1, 2, 3)))).all()


@given(arrays(np.float32, (1, 2, 3, 4), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_float32_is_exact(values: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_level(codec("float32"), encode_level(codec("float32"), values)), values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_level_and_sample(value: float) -> None:
    values = np.zeros((1, 2, 3, 4), np.float32)
    values[0, 1, 2, 3] = value
    with pytest.raises(TeacherError, match=r"level l3 of sample 'a/b\.png': 1 of 24 features not finite"):
        encode_level(codec(), values, "a/b.png")


def test_overflow_of_float16_is_refused_and_float32_takes_it() -> None:
    values = np.full((1, 2, 3, 4), 70000.0, np.float32)
    with pytest.raises(ConfigError, match=r"level l3 of sample 'k': 7e\+04 does not fit float16; .*dtype=float32"):
        encode_level(codec(), values, "k")
    assert encode_level(codec("float32"), values)[SYMBOLS].max() == 70000


def test_other_shapes_dtypes_codecs_and_parameters_are_refused() -> None:
    with pytest.raises(ShapeError, match="l3"):
        encode_level(codec(), np.zeros((1, 2, 4, 3), np.float32))
    for wrong in (np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 2, 4, 3), np.float16)):
        with pytest.raises(ShapeError, match="l3"):
            decode_level(codec(), {SYMBOLS: wrong})
    with pytest.raises(ConfigError, match="codec 'nf4' of level l3 is unknown; choose one of cast"):
        codec(codec=CodecSpec(name="nf4"))
    with pytest.raises(ConfigError, match=r"codec cast of level l3 takes no parameters, found \['bits'\]"):
        codec(codec=CodecSpec(parameters={"bits": 8}))


def test_coded_levels_are_no_array() -> None:
    values = np.zeros((3, 2, 3, 4), np.float32)
    coded = CodedLevels(3, {"l3": [CodedPiece(codec(), encode_level(codec(), values))]})
    with pytest.raises(TypeError, match="symbols, no features"):
        np.asarray(coded)
    assert coded.decode()["l3"].shape == values.shape
