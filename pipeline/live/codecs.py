"""Live features as a dataset would have stored them, so that a student sees one distribution, cached or live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtpipe.distill.stream.decode import decode_on_device
from dtpipe.extract.shards.codecs import encode_for_device
from dtpipe.manifests.codecs.base import LevelCodec

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = "cast"  # loses less than a student can see


def as_stored(codec: LevelCodec, features: Tensor) -> Tensor:
    """What comes back of features that are coded and decoded; those that cannot be coded, and all under `cast`, stay.

    Shapes: (n, V, C, h, w) -> (n, V, C, h, w).
    """
    import torch

    if codec.level.codec.name == _ROUNDING:
        return features
    parts, fits = encode_for_device(codec, features)
    decoded = decode_on_device(codec, {name: values.flatten(0, 1) for name, values in parts.items()})
    return torch.where(fits[:, None, None, None, None], decoded.reshape(features.shape).to(features.dtype), features)
