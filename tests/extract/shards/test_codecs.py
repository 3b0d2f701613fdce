"""Symbols leave the device as the numpy reference makes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtpipe.extract.shards.codecs import encode_on_device
from dtpipe.manifests.codecs.base import SYMBOLS, LevelCodec, decode_level
from dtpipe.manifests.codecs.fit import FitTarget
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.codecs.transform import NORM, TransformLevel
from parts.fits import fitted_codec, level_of, smooth_features

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
FEATURES = smooth_features(48, channels=12, side=8, seed=1).reshape(24, 2, 12, 8, 8)


def on_device(codec: LevelCodec, features: np.ndarray, device: str = "cpu") -> tuple[dict[str, np.ndarray], np.ndarray]:
    parts, finite = encode_on_device(codec, torch.from_numpy(features).to(device))
    return {name: values.cpu().numpy() for name, values in parts.items()}, finite.cpu().numpy()


@pytest.fixture(scope="module", params=["float16", "float32"])
def transform(request: pytest.FixtureRequest) -> TransformLevel:
    """Fitted to other features of the same kind."""
    codec = fitted_codec(smooth_features(64, channels=12, side=8), FitTarget(relative_mse=0.002), dtype=request.param)
    assert isinstance(codec, TransformLevel)
    assert codec.parameters.wide > 0, "some numbers take two bytes"
    return codec


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_int8_is_the_reference_bit_for_bit(dtype: str, device: str) -> None:
    features = FEATURES.copy()
    features[3, 1, 2] = 1.5  # a channel of one value
    features[4, 0] = 0
    codec = open_codec(level_of(features, "int8", dtype))
    parts, finite = on_device(codec, features, device)
    expected = codec.encode(features)
    assert parts.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(parts[name], values)
        assert parts[name].dtype == codec.parts[name].dtype
    assert finite.all()


@pytest.mark.parametrize("device", DEVICES)
def test_transform_is_the_reference_but_where_a_value_lies_on_a_border(transform: TransformLevel, device: str) -> None:
    parts, finite = on_device(transform, FEATURES, device)
    expected = transform.encode(FEATURES)
    apart = parts[SYMBOLS] != expected[SYMBOLS]
    assert apart.mean() < 1e-6  # of values within 1e-9 steps of a border: none is to be expected
    np.testing.assert_allclose(parts[NORM][..., :2], expected[NORM][..., :2], rtol=2**-22)  # two steps of float32
    np.testing.assert_allclose(parts[NORM][..., 2], expected[NORM][..., 2], rtol=1e-3)  # float16 rounds other sums
    assert parts[SYMBOLS].dtype == np.int8
    assert finite.all()


def test_the_stated_error_is_of_the_symbols_that_were_stored(transform: TransformLevel) -> None:
    parts, _ = on_device(transform, FEATURES)
    lost = decode_level(transform, parts).astype(np.float64) - FEATURES
    assert (np.sqrt(np.square(lost).mean(axis=(-3, -2, -1))) <= transform.error(parts)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_row_that_cannot_be_coded_is_named_and_no_other(value: float) -> None:
    features = FEATURES.copy()
    features[5, 1, 3, 2, 2] = value
    int8 = open_codec(level_of(features, "int8", "float16"))
    fitted = fitted_codec(smooth_features(16, channels=12, side=8), FitTarget(relative_mse=0.02), dtype="float16")
    for codec in (int8, fitted):
        _, finite = on_device(codec, features)
        assert np.flatnonzero(~finite).tolist() == [5], codec
