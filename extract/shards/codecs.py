"""Encoding where the teacher runs, so that only symbols leave the device.

One rule: an encoder gives what its codec's reference gives, bit for bit; under `transform`, whose sums have another
order, but for values that lie within 1e-9 steps of where a symbol changes. What a sample lost is measured on its own
symbols, so it is stated as it is. Levels of a codec without an encoder leave the device as float32 features, and the
reference encodes them on the host; so do all that are not merely rounded where the device has no float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.manifests.codecs.base import SYMBOLS, Array, LevelCodec, are_finite
from dtpipe.manifests.codecs.basis import cosine_matrix
from dtpipe.manifests.codecs.int8 import INT8, LARGEST, SCALE
from dtpipe.manifests.codecs.quantise import LARGEST_NUMBER
from dtpipe.manifests.codecs.topk import BEYOND_ROUNDING, CLASSES, REST, STATED, TOPK, TopkLevel
from dtpipe.manifests.codecs.transform import NORM, ROUNDED, TRANSFORM, TransformLevel

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


def _int8(codec: LevelCodec, features: Tensor) -> dict[str, Tensor]:
    values = features.double()
    least, most = values.amin(dim=(-2, -1)), values.amax(dim=(-2, -1))
    scale = torch.stack([(most - least) / (2 * LARGEST), (most + least) / 2], dim=-2).float()
    scale[_do_not_fit(codec, values)] = float("inf")
    step, offset = (scale[..., row, :, None, None].double() for row in (0, 1))
    steps = torch.where(step > 0, (values - offset) / step, 0)
    return {SYMBOLS: steps.nan_to_num().round().clamp(-LARGEST, LARGEST).to(torch.int8), SCALE: scale}


def _do_not_fit(codec: LevelCodec, values: Tensor) -> Tensor:
    """Which rows and views hold more than the level's dtype. Shapes: (.., C, h, w) -> (..)."""
    return values.abs().amax(dim=_SAMPLE) > torch.finfo(getattr(torch, codec.level.dtype)).max


_SAMPLE: Final = (-3, -2, -1)


@dataclass(frozen=True)
class _Basis:
    """What `transform` was fitted with, on a device, in float64."""

    regions: tuple[tuple[slice, Tensor], ...]
    """Where the frequencies of each region lie in `by_region`, and its rows (k, C)."""
    by_region: Tensor
    back: Tensor
    """(F,): frequencies in the order of regions, and back."""
    centre: Tensor
    """(C, 1, 1)."""
    down: Tensor
    across: Tensor
    order: Tensor
    """(n,): which coefficients are stored."""
    zone: Tensor
    rounding: Tensor
    shift: Tensor
    """(n), (n), (2, n): of each symbol's band."""

    @classmethod
    def of(cls, codec: TransformLevel, device: torch.device) -> _Basis:
        """As the codec has it."""
        basis, quantiser, level = codec.basis, codec.quantiser, codec.level

        def on_device(array: Array) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
            return tensor.double() if tensor.is_floating_point() else tensor

        by_region, places = basis.by_region()
        rows = [on_device(of_region) for _, of_region in basis.regions()]
        return cls(
            tuple(zip(places, rows, strict=True)),
            on_device(by_region),
            on_device(np.argsort(by_region)),
            on_device(basis.centre[:, None, None]),
            on_device(cosine_matrix(level.height)),
            on_device(cosine_matrix(level.width)),
            on_device(quantiser.order),
            *(on_device(values[quantiser.bands].T) for values in (quantiser.zone, quantiser.rounding, quantiser.shift)),
        )

    def forward(self, normal: Tensor, components: int) -> Tensor:
        """Coefficients. Shapes: (n, C, h, w) -> (n, K, h, w)."""
        waves = (self.down @ (normal - self.centre) @ self.across.T).flatten(2)[:, :, self.by_region]
        coefficients = waves.new_zeros(len(waves), components, waves.shape[2])
        for place, rows in self.regions:
            coefficients[:, : len(rows), place] = torch.matmul(rows, waves[:, :, place])
        return coefficients[:, :, self.back].reshape(len(waves), components, *normal.shape[-2:])

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Normalised features. Shapes: (n, K, h, w) -> (n, C, h, w)."""
        flat = coefficients.flatten(2)[:, :, self.by_region]
        waves = torch.cat([torch.matmul(rows.T, flat[:, : len(rows), place]) for place, rows in self.regions], dim=2)[
            :, :, self.back
        ]
        maps = waves.reshape(*waves.shape[:2], *coefficients.shape[-2:])
        return self.down.T @ maps @ self.across + self.centre


_MOST_KEPT = 16
_bases: dict[tuple[str, str], _Basis] = {}  # by digest of what was fitted, and device


def _basis_of(codec: TransformLevel, device: torch.device) -> _Basis:
    key = codec.parameters.fitted, str(device)
    if key not in _bases:
        while len(_bases) >= _MOST_KEPT:
            _bases.pop(next(iter(_bases)), None)
        _bases[key] = _Basis.of(codec, device)
    return _bases[key]


def _transform(codec: LevelCodec, features: Tensor) -> dict[str, Tensor]:
    """As the reference, in float64."""
    assert isinstance(codec, TransformLevel)
    leading, values = features.shape[:-3], features.double().flatten(0, -4)
    basis, dtype = _basis_of(codec, features.device), getattr(torch, codec.level.dtype)
    mean = values.mean(dim=_SAMPLE).float()
    deviation = values.std(dim=_SAMPLE, correction=0).float()
    scale = torch.where(deviation > 0, deviation, float("inf")).double()[:, None, None, None]
    normal = (values - mean.double()[:, None, None, None]) / scale
    coefficients = basis.forward(normal, codec.parameters.components)
    numbers = _quantised(codec, basis, coefficients.flatten(1)[:, basis.order])
    most = torch.finfo(dtype).max
    decoded = basis.inverse(_restored(codec, basis, numbers, coefficients))
    decoded = decoded * deviation.double()[:, None, None, None] + mean.double()[:, None, None, None]
    lost = decoded.clamp(-most, most).to(dtype).double() - values
    error = (
        lost.square().mean(dim=_SAMPLE).sqrt() + values.square().mean(dim=_SAMPLE).sqrt() * ROUNDED[codec.level.dtype]
    )
    above = torch.nextafter(error.float(), torch.full_like(mean, float("inf")))
    norm = torch.stack([deviation, mean, above], dim=-1)
    norm[_do_not_fit(codec, values)] = float("inf")
    symbols = _to_symbols(numbers, codec.parameters.wide)
    return {SYMBOLS: symbols.reshape(*leading, -1), NORM: norm.reshape(*leading, 3)}


def _quantised(codec: TransformLevel, basis: _Basis, values: Tensor) -> Tensor:
    """Whole numbers. Shapes: (n, symbols) -> (n, symbols) float64."""
    steps = values.abs() / codec.parameters.step
    magnitude = (steps + basis.rounding).floor().clamp(1, LARGEST_NUMBER)
    return torch.where(steps < basis.zone, 0, magnitude) * values.sign()


def _restored(codec: TransformLevel, basis: _Basis, numbers: Tensor, like: Tensor) -> Tensor:
    """The coefficients that whole numbers stand for."""
    shift = torch.where(numbers.abs() > 1, basis.shift[1], basis.shift[0])
    flat = torch.zeros_like(like).flatten(1)
    flat[:, basis.order] = (numbers - numbers.sign() * shift) * codec.parameters.step
    return flat.view_as(like)


def _to_symbols(numbers: Tensor, wide: int) -> Tensor:
    """As `to_symbols` of the reference."""
    whole = numbers.to(torch.int32)
    first = ((whole[:, :wide] + 128) & 255) - 128
    second = (whole[:, :wide] - first) >> 8
    return torch.cat([first, whole[:, wide:].clamp(-127, 127), second], dim=1).to(torch.int8)


ENCODERS: dict[str, Encode] = {"cast": _cast, INT8: _int8, TOPK: _topk, TRANSFORM: _transform}
_FEATURES = "features"  # in place of parts, on their way to the reference
_WITHOUT_FLOAT64: Final = frozenset({"mps"})
_ONLY_ROUND: Final = frozenset({"cast"})


def encoder_for(codec: str, device: torch.device) -> Encode | None:
    """The encoder of a codec on a device; None where the reference encodes on the host."""
    in_float32 = codec in _ONLY_ROUND or device.type not in _WITHOUT_FLOAT64
    return ENCODERS.get(codec) if in_float32 else None


def encode_on_device(codec: LevelCodec, features: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What of a level leaves the device, and which rows are finite as features and as parts.

    Shapes: (n, V, C, h, w) -> {part: (n, V, ..)}, (n,) bool.
    """
    encode = encoder_for(codec.level.codec.name, features.device)
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


def encode_for_device(codec: LevelCodec, features: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Parts that stay where the features are, and which rows their codec can hold; by the reference where there is no
    encoder. Shapes: (n, V, C, h, w) -> {part: (n, V, ..)}, (n,) bool.
    """
    sent, finite = encode_on_device(codec, features)
    if _FEATURES not in sent:
        return sent, finite
    on_host, fits = encode_on_host(codec, {_FEATURES: sent[_FEATURES].cpu().numpy()}, finite.cpu().numpy())
    parts = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in on_host.items()}
    return {name: values.to(features.device) for name, values in parts.items()}, torch.from_numpy(fits).to(finite)
