"""Levels under codecs that were fitted, with the arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.codecs.fit import Fit, FitTarget
from dtpipe.manifests.codecs.fitted import FITTED, HeldFitted, encode_fitted
from dtpipe.manifests.codecs.rans_tables import Coder
from dtpipe.manifests.codecs.registry import CODECS, open_codec
from dtpipe.manifests.codecs.transform_fit import fit_transform
from dtpipe.manifests.schema import CodecSpec, LevelSpec

Features = NDArray[np.float32]


def level_of(features: Features, codec: str = "cast", dtype: str = "float32", **parameters: object) -> LevelSpec:
    """`l2` of the shape of features [.., C, H, W]."""
    channels, height, width = features.shape[-3:]
    spec = CodecSpec(name=codec, parameters=parameters)
    fields = {"channels": channels, "height": height, "width": width, "dtype": dtype, "codec": spec}
    return LevelSpec.model_validate({"name": "l2", "stride": 4, "tap": "up.3", **fields})


def opened(level: LevelSpec, fit: Fit, codec: str = "transform") -> LevelCodec:
    """The codec of a fit."""
    digest, data = encode_fitted(fit.arrays)
    spec = CodecSpec(name=codec, parameters={**fit.parameters, FITTED: digest})
    return open_codec(level.model_copy(update={"codec": spec}), HeldFitted({digest: data}))


def fitted_codec(features: Features, target: FitTarget, codec: str = "transform", dtype: str = "float32") -> LevelCodec:
    """FittedArrays on features [N, C, H, W]."""
    level, fit = level_of(features, dtype=dtype), CODECS[codec].fit
    assert fit is not None
    return opened(level, fit(level, features)(target), codec)


def fit_levels(
    levels: Sequence[LevelSpec], coder: Coder = "rans", max_error: float = 0.01
) -> tuple[tuple[LevelSpec, ...], dict[str, bytes]]:
    """Levels under `transform`, fitted to smooth features of their shapes, and the files that they name."""
    files, coded = {}, []
    for level in levels:
        rng = np.random.Generator(np.random.Philox(level.stride))
        features = rng.standard_normal((12, level.channels, level.height, level.width)).astype(np.float32)
        fit = fit_transform(level, features)(FitTarget(relative_mse=max_error, entropy=coder))
        digest, data = encode_fitted(fit.arrays)
        files[digest] = data
        spec = CodecSpec(name="transform", parameters={**fit.parameters, FITTED: digest})
        coded.append(level.model_copy(update={"codec": spec}))
    return tuple(coded), files


def smooth_features(num: int, channels: int = 6, side: int = 8, seed: int = 0) -> Features:
    """As a decoder gives them: channels that say much the same, maps of low frequencies, samples of other strengths."""
    rng = np.random.Generator(np.random.Philox(seed))
    cells = np.fft.fftfreq(side) * side
    decay = 1 / (1 + cells[:, None] ** 2 + cells[None, :] ** 2)
    maps = np.fft.ifft2(np.fft.fft2(rng.standard_normal((num, channels, side, side))) * decay).real
    mix = np.random.Generator(np.random.Philox(99)).standard_normal((channels, channels)) / 2 ** np.arange(channels)
    values = np.einsum("ck,nkhw->nchw", mix, maps) * np.exp(rng.standard_normal((num, 1, 1, 1)))
    return (values * 3 + rng.standard_normal((num, 1, 1, 1))).astype(np.float32)


def relative_mse(decoded: NDArray[np.generic], true: Features) -> float:
    """Mean over samples of the squared error over the variance, in float64."""
    apart, values = decoded.astype(np.float64) - true, true.astype(np.float64)
    axes = (-3, -2, -1)
    return float((np.square(apart).mean(axis=axes) / values.var(axis=axes)).mean())
