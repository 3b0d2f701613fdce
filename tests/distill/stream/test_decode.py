"""The device decodes symbols as the reference does, whatever codecs the samples of a level lie under."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtpipe.distill.stream.decode import DECODERS, SentLevels
from dtpipe.distill.stream.transfer import DeviceCopies
from dtpipe.manifests.codecs.base import SYMBOLS, encode_level
from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.codecs.fit import FitTarget
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.schema import CodecSpec
from parts.codecs import register_turned
from parts.fits import fitted_codec, level_of, smooth_features
from parts.memory import level_spec

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.fixture(params=["float16", "float32"])
def coded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CodedLevels:
    """Seven samples: of l2 five under one codec and two under another, of l3 all under one."""
    register_turned(monkeypatch)
    levels = [level_spec("l2", 4, 6, dtype=request.param), level_spec("l3", 8, 5, dtype=request.param)]
    noise = np.random.Generator(np.random.Philox(0))
    pieces = {}
    for level, rows in zip(levels, [([6, 0, 1, 5, 3], [4, 2]), (None,)], strict=True):
        pieces[level.name] = []
        for name, chosen in zip(("turned", "cast"), rows, strict=False):
            codec = open_codec(level.model_copy(update={"codec": CodecSpec(name=name)}))
            shape = (7 if chosen is None else len(chosen), level.channels, level.height, level.width)
            parts = encode_level(codec, noise.standard_normal(shape, np.float32))
            pieces[level.name].append(CodedPiece(codec, parts, None if chosen is None else np.array(chosen)))
    return CodedLevels(7, pieces)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_device", [True, False], ids=["decoder", "reference"])
def test_decoding_on_a_device_equals_the_reference(
    coded: CodedLevels, device: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_device:
        monkeypatch.delitem(DECODERS, "turned")
    copies = DeviceCopies(torch.device(device))
    levels = SentLevels.send(coded, copies).receive(copies)
    expected = coded.decode()
    assert list(levels) == list(expected) == ["l2", "l3"]
    for name, level in levels.items():
        assert level.device.type == device
        np.testing.assert_array_equal(level.cpu().numpy(), expected[name])
        assert level.dtype == getattr(torch, str(expected[name].dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_int8_is_decoded_bit_for_bit_and_transform_within_what_it_states(dtype: str, device: str) -> None:
    features = smooth_features(24, channels=12, seed=1)
    int8 = open_codec(level_of(features, "int8", dtype))
    fitted = fitted_codec(smooth_features(64, channels=12), FitTarget(relative_mse=0.002), dtype=dtype)
    coded = {"int8": CodedPiece(int8, encode_level(int8, features)), "l2": CodedPiece(fitted, fitted.encode(features))}
    copies = DeviceCopies(torch.device(device))
    levels = SentLevels.send(CodedLevels(24, {name: [piece] for name, piece in coded.items()}), copies).receive(copies)
    decoded = {name: level.cpu().numpy() for name, level in levels.items()}
    assert {values.dtype.name for values in decoded.values()} == {dtype}
    np.testing.assert_array_equal(decoded["int8"], int8.decode(coded["int8"].parts))
    expected, stated = fitted.decode(coded["l2"].parts), fitted.error(coded["l2"].parts)
    lost = decoded["l2"].astype(np.float64) - features
    assert (np.sqrt(np.square(lost).mean(axis=(1, 2, 3))) <= stated).all()
    apart = np.abs(decoded["l2"].astype(np.float64) - expected)
    size = np.sqrt(np.square(expected.astype(np.float64)).mean(axis=(1, 2, 3), keepdims=True))
    steps = 0 if dtype == "float32" else np.spacing(np.abs(expected)).astype(np.float64)  # another neighbour there
    assert (apart <= steps + 2**-18 * size).all()  # float32 sums of 12 x 64 numbers


def test_levels_of_one_codec_cross_to_the_cpu_without_a_copy(coded: CodedLevels) -> None:
    (piece,) = coded.pieces["l3"]
    codec = open_codec(piece.codec.level.model_copy(update={"codec": CodecSpec()}))
    parts = encode_level(codec, coded.decode()["l3"])
    copies = DeviceCopies(torch.device("cpu"))
    level = SentLevels.send(CodedLevels(7, {"l3": [CodedPiece(codec, parts)]}), copies).receive(copies)["l3"]
    assert level.numpy().ctypes.data == parts[SYMBOLS].ctypes.data
