"""Encoding where the teacher runs, so that only symbols leave the device.

One rule: an encoder gives what its codec's reference gives, bit for bit. Levels of a codec without an encoder leave
the device as float32 features, and the reference encodes them on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.manifests.codecs.base import SYMBOLS, Array, LevelCodec, are_finite
from dtpipe.manifests.codecs.topk import BEYOND_ROUNDING, CLASSES, REST, STATED, TOPK, TopkLevel

Encode = Callable[[LevelCodec, Tensor], dict[str, Tensor]]
"""(codec, features (..., C, h, w)) -> parts."""


def _cast(codec: LevelCodec, features: Tensor) -> dict[str, Tensor]:
    return {SYMBOLS: features.to(getattr(torch, codec.level.dtype))}


def _topk(codec: LevelCodec, features: Tensor) -> dict[str, Tensor]:
    assert isinstance(codec, TopkLevel)
    logits, dtype = features.double(), getattr(torch, codec.level.dtype)
    ranked, order = torch.sort(logits, dim=-3, descending=True, stable=True)
    kept, others = ranked[..., : codec.k, :, :].to(dtype), ranked[..., codec.k :, :, :]
    largest = others[..., :1, :, :]
    shares = ((others - largest) / codec.temperature).exp().mean(dim=-3, keepdim=True)
    rest, classes = (largest + codec.temperature * shares.log()).to(dtype), order[..., : codec.k, :, :]
    lost = rest.expand(logits.shape).scatter(-3, classes, kept).double() - logits
    error = lost.square().mean(dim=(-3, -2, -1)).sqrt()[..., None] * BEYOND_ROUNDING
    small = torch.uint8 if codec.level.channels <= 256 else torch.int16
    return {SYMBOLS: kept, CLASSES: classes.to(small), REST: rest, STATED: error.float()}


ENCODERS: dict[str, Encode] = {"cast": _cast, TOPK: _topk}
_FEATURES = "features"  # in place of parts, on their way to the reference


def encode_on_device(codec: LevelCodec, features: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What of a level leaves the device, and which rows are finite as features and as parts.

    Shapes: (n, V, C, h, w) -> {part: (n, V, ..)}, (n,) bool.
    """
    encode = ENCODERS.get(codec.level.codec.name)
    parts = {} if encode is None else encode(codec, features)
    finite = [_finite_rows(values) for values in (features, *parts.values())]
    return parts or {_FEATURES: features.float()}, torch.stack(finite).all(dim=0)


def _finite_rows(values: Tensor) -> Tensor:
    """Which rows are finite, by their extremes, which NaN and infinity reach: a seventh of the time of looking at each
    value on a CPU. Shapes: (n, ..) -> (n,) bool.
    """
    if not values.is_floating_point():
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    flat = values.flatten(1)
    return torch.isfinite(flat.amax(dim=1)) & torch.isfinite(flat.amin(dim=1))


def encode_on_host(
    codec: LevelCodec, sent: Mapping[str, Array], finite: NDArray[np.bool_]
) -> tuple[Mapping[str, Array], NDArray[np.bool_]]:
    """Parts of what left the device, and which rows their codec can hold. Shapes: -> {part: [n, V, ..]}, [n] bool."""
    if _FEATURES not in sent:
        return sent, finite
    parts = codec.encode(np.where(finite[:, None, None, None, None], sent[_FEATURES], 0))
    return parts, finite & [
        are_finite({part: values[row] for part, values in parts.items()}) for row in range(len(finite))
    ]
