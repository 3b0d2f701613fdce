"""Top-k logits: what is kept, what stands for the rest, and that devices code as the reference does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from dtpipe.distill.stream.decode import SentLevels
from dtpipe.distill.stream.transfer import DeviceCopies
from dtpipe.extract.shards.codecs import encode_on_device
from dtpipe.manifests.codecs.base import decode_level, encode_level
from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.codecs.topk import TopkLevel
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.schema import CodecSpec, LevelSpec

TAU = 4.0  # equation (5)


def codec(k: int = 3, classes: int = 8, side: int = 4, dtype: str = "float16", **parameters: Any) -> TopkLevel:
    spec = CodecSpec(name="topk", parameters={"k": k, **parameters})
    fields = {"name": "l2.labels", "stride": 4, "channels": classes, "height": side, "width": side, "tap": "labels"}
    opened = open_codec(LevelSpec.model_validate({**fields, "dtype": dtype, "role": "soft_labels", "codec": spec}))
    assert isinstance(opened, TopkLevel)
    return opened


def logits(*leading: int, classes: int = 8, side: int = 4, seed: int = 0) -> np.ndarray:
    """As a trained head gives them: one class or two stand out."""
    rng = np.random.Generator(np.random.Philox(seed))
    values = rng.standard_normal((*leading, classes, side, side), np.float32) * 3
    return values + 6 * (values == values.max(axis=-3, keepdims=True))


def divergence(true: np.ndarray, stored: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the softened distributions."""
    one, other = (log_softmax(values.astype(np.float64) / TAU, axis=-3) for values in (true, stored))
    return float((np.exp(one) * (one - other)).sum(axis=-3).mean())


def test_one_cell_by_hand() -> None:
    cell = np.array([1.0, 5.0, -2.0, 4.0, 0.5], np.float32).reshape(1, 5, 1, 1)
    level = codec(2, 5, 1, "float32")
    parts = encode_level(level, cell)
    assert parts[""].ravel().tolist() == [5.0, 4.0]
    assert parts["classes"].ravel().tolist() == [1, 3]
    rest = TAU * (logsumexp(np.array([1.0, -2.0, 0.5]) / TAU) - np.log(3))
    np.testing.assert_allclose(parts["rest"].ravel(), rest, rtol=1e-6)
    decoded = decode_level(level, parts).ravel()
    np.testing.assert_allclose(decoded, [rest, 5, rest, 4, rest], rtol=1e-6)
    lost = np.sqrt(((rest - 1) ** 2 + (rest + 2) ** 2 + (rest - 0.5) ** 2) / 5)
    np.testing.assert_allclose(level.error(parts), [lost], rtol=2e-6)


def test_kept_classes_have_their_softened_probability_and_no_other_constant_is_closer() -> None:
    true, level = logits(5), codec(dtype="float32")
    decoded = decode_level(level, encode_level(level, true)).astype(np.float64)
    order = np.argsort(-true, axis=-3)[:, :3]
    kept = [np.take_along_axis(log_softmax(values / TAU, axis=-3), order, axis=-3) for values in (true, decoded)]
    np.testing.assert_allclose(*kept, atol=2e-6)  # float32 logits
    best = divergence(true, decoded)
    is_rest = np.ones_like(true, bool)
    np.put_along_axis(is_rest, order, False, axis=-3)
    for shift in (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0):
        assert divergence(true, decoded + shift * is_rest) > best


def test_the_share_at_temperature_4_beats_the_other_fills() -> None:
    true = logits(20, classes=21, seed=1)
    ranked = np.sort(true, axis=-3)[..., ::-1, :, :]
    order = np.argsort(-true, axis=-3)

    def filled(rest: np.ndarray) -> float:
        stored = np.array(np.broadcast_to(rest, true.shape))
        np.put_along_axis(stored, order[..., :3, :, :], ranked[..., :3, :, :], axis=-3)
        return divergence(true, stored)

    level = codec(3, 21, dtype="float16")
    chosen = divergence(true, decode_level(level, encode_level(level, true)))
    below = filled(ranked[..., 2:3, :, :] - 1)  # the smallest that is kept, and a margin
    at_1 = logsumexp(ranked[..., 3:, :, :], axis=-3, keepdims=True) - np.log(18)  # the share without softening
    print(f"divergence at 4: {chosen:.4f}; smallest kept - 1: {below:.4f}; share at 1: {filled(at_1):.4f}")
    assert chosen < filled(at_1) < below


def test_of_equal_logits_the_first_classes_are_kept() -> None:
    parts = encode_level(codec(), np.zeros((1, 8, 4, 4), np.float32))
    assert parts["classes"][0, :, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("k", "classes"), [(3, 8), (1, 2), (5, 300)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_device_codes_as_the_reference(k: int, classes: int, dtype: str) -> None:
    level, true = codec(k, classes, dtype=dtype), np.round(logits(4, 2, classes=classes), 1)  # with equal ones
    parts, finite = encode_on_device(level, torch.from_numpy(true))
    reference = encode_level(level, true)
    assert finite.all()
    assert parts.keys() == reference.keys() == level.parts.keys()
    for part, values in parts.items():
        np.testing.assert_array_equal(values.numpy(), reference[part])
        assert values.numpy().dtype == level.parts[part].dtype
    one_view = {part: values[:, 0] for part, values in reference.items()}
    coded = CodedLevels(4, {"l2.labels": [CodedPiece(level, one_view)]})
    copies = DeviceCopies(torch.device("cpu"))
    received = SentLevels.send(coded, copies).receive(copies)["l2.labels"]
    np.testing.assert_array_equal(received.numpy(), coded.decode()["l2.labels"])


def test_the_stated_error_is_that_of_what_is_stored() -> None:
    level, true = codec(), logits(6)
    parts = encode_level(level, true)
    distance = decode_level(level, parts).astype(np.float64) - true
    true_error = np.sqrt(np.square(distance).mean(axis=(1, 2, 3)))
    stated = level.error(parts)
    assert (true_error <= stated).all()
    np.testing.assert_allclose(stated, true_error, rtol=1e-5)


def test_rows_that_are_not_finite_or_too_large_are_not_stored() -> None:
    true = np.stack([logits(), logits(), logits()])
    true[1, 2, 0, 0], true[2, 2, 0, 0] = np.nan, 7e4
    _, finite = encode_on_device(codec(), torch.from_numpy(true)[:, None])
    assert finite.tolist() == [True, False, False]
    with pytest.raises(ConfigError, match="does not fit float16"):
        encode_level(codec(), true[2:])


def test_settings_and_symbols_that_make_no_sense_are_refused() -> None:
    for k in (0, 8):
        with pytest.raises(ConfigError, match=f"is to keep {k} of 8 classes; keep 1 to 7, or all of them under cast"):
            codec(k)
    with pytest.raises(ConfigError, match="takes k, a number of classes, and temperature"):
        codec(3, margin=1)
    with pytest.raises(ConfigError, match="temperature"):
        codec(3, temperature=0)
    features = {"name": "l2", "stride": 4, "channels": 8, "height": 4, "width": 4, "tap": "up.3"}
    with pytest.raises(ConfigError, match="is for soft labels, and the level holds features"):
        open_codec(LevelSpec.model_validate({**features, "codec": CodecSpec(name="topk", parameters={"k": 3})}))
    parts = encode_level(codec(), logits(1))
    parts["classes"][0, 0, 0, 0] = 8
    with pytest.raises(ShapeError, match="has a logit of class 8, and 8 classes"):
        decode_level(codec(), parts)
