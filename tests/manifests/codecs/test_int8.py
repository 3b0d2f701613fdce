"""Eight bits a value: by hand, within the stated error at any scale, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dtpipe.manifests.codecs.base import decode_level, encode_level
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.errors import ConfigError, TeacherError
from parts.fits import level_of, relative_mse, smooth_features


def test_one_channel_by_hand() -> None:
    values = np.array([0.0, 1.0, 127.0, 254.0, 3.4, 3.6], np.float32).reshape(1, 1, 2, 3)
    codec = open_codec(level_of(values, "int8"))
    parts = encode_level(codec, values)
    assert parts["scale"].tolist() == [[[1.0], [127.0]]]  # one step is 1, symbol 0 is 127
    assert parts[""].ravel().tolist() == [-127, -126, 0, 127, -124, -123]
    assert decode_level(codec, parts).ravel().tolist() == [0, 1, 127, 254, 3, 4]


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, (2, 3, 2, 2), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.sampled_from([1.0, 1e-30, 2.0**-149]),
)
@example(np.full((2, 3, 2, 2), [[np.finfo(np.float32).max, 3e38], [-1e38, -np.finfo(np.float32).max]], np.float32), 1.0)
@example(np.full((2, 3, 2, 2), [[np.finfo(np.float32).max, 0], [1e38, 3e38]], np.float32), 1.0)
def test_decoded_features_are_within_the_stated_error_at_any_scale(values: np.ndarray, scale: float) -> None:
    values = (values.astype(np.float64) * scale).astype(np.float32)
    codec = open_codec(level_of(values, "int8"))
    parts = encode_level(codec, values)
    lost = decode_level(codec, parts).astype(np.float64) - values
    assert (np.sqrt(np.square(lost).mean(axis=(1, 2, 3))) <= codec.error(parts)).all()


def test_the_error_is_that_of_equal_steps() -> None:
    values = smooth_features(4)
    codec = open_codec(level_of(values, "int8", "float16"))
    parts = encode_level(codec, values)
    decoded = decode_level(codec, parts)
    assert decoded.dtype == np.float16
    steps = np.ptp(values.astype(np.float64), axis=(2, 3)) / 254
    expected = (np.square(steps).mean(axis=1) / 12 / values.astype(np.float64).var(axis=(1, 2, 3))).mean()
    np.testing.assert_allclose(relative_mse(decoded, values), expected, rtol=0.1)  # 64 cells of a channel


def test_a_channel_of_one_value_comes_back_exactly() -> None:
    values = np.full((1, 2, 1, 1), 0.3, np.float32)
    codec = open_codec(level_of(values, "int8"))
    np.testing.assert_array_equal(decode_level(codec, encode_level(codec, values)), values)


def test_what_cannot_be_stored_is_refused() -> None:
    values = np.full((1, 1, 1, 2), 7e4, np.float32)
    with pytest.raises(ConfigError, match=r"7e\+04 does not fit float16"):
        encode_level(open_codec(level_of(values, "int8", "float16")), values)
    with pytest.raises(TeacherError, match="not finite"):
        encode_level(open_codec(level_of(values, "int8")), values * np.nan)
    with pytest.raises(ConfigError, match="codec int8 of level l2 takes no parameters"):
        open_codec(level_of(values, "int8", bits=4))
