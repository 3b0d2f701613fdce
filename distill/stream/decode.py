"""From symbols to features on the training device: symbols cross to it, and are decoded there.

One rule: a decoder gives what its codec's reference gives; that of `transform` sums in float32, which is within the
error that the codec states beside what it lost. Levels of a codec without one are decoded by the reference
before they cross. Chunks under rans cross as they are stored where a GPU decodes them, which takes Triton and a C
compiler; else compiled loops decode them where they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from dtpipe.distill.stream.mismatched import MismatchedPairs
from dtpipe.distill.stream.transfer import DeviceCopies, Sent
from dtpipe.manifests.codecs.base import SYMBOLS, Array, LevelCodec, decode_level
from dtpipe.manifests.codecs.basis import cosine_matrix
from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.codecs.int8 import INT8, SCALE
from dtpipe.manifests.codecs.rans_tables import RansTables
from dtpipe.manifests.codecs.topk import CLASSES, REST, TOPK
from dtpipe.manifests.codecs.transform import NORM, TRANSFORM, TransformLevel
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset, JoinedDataset
from dtpipe.manifests.read.source import FeatureSource

_log = logging.getLogger(__name__)

Decode = Callable[[LevelCodec, Mapping[str, Tensor]], Tensor]
"""(codec, parts of (B, C, h, w)) -> features (B, C, h, w), in the level's dtype."""


def _cast(_codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    return parts[SYMBOLS]


def _topk(codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    rest, level = parts[REST], codec.level
    logits = rest.expand(len(rest), level.channels, level.height, level.width)
    return logits.scatter(1, parts[CLASSES].long(), parts[SYMBOLS])


def _int8(codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    step, offset = (parts[SCALE][:, row, :, None, None] for row in (0, 1))
    return _rounded(parts[SYMBOLS].float() * step + offset, codec.level.dtype)


def _rounded(values: Tensor, dtype: str) -> Tensor:
    """The nearest value that the dtype has, at most its largest."""
    most = torch.finfo(getattr(torch, dtype)).max
    return values.clamp(-most, most).to(getattr(torch, dtype))


@dataclass(frozen=True)
class _Basis:
    """What `transform` was fitted with, on a device, in float32."""

    regions: tuple[tuple[slice, Tensor], ...]
    """Where the frequencies of each region lie, in the order of regions, and its columns (C, k)."""
    order: Tensor
    """(n,): where stored coefficients go, with frequencies in the order of regions."""
    back: Tensor
    """(F,): where each frequency lies in that order."""
    centre: Tensor
    """(C, 1, 1)."""
    down: Tensor
    across: Tensor
    shift: Tensor
    """(2, n): of each symbol's band."""

    @classmethod
    def of(cls, codec: TransformLevel, device: torch.device) -> _Basis:
        """As the codec has it."""
        basis, quantiser, level = codec.basis, codec.quantiser, codec.level

        def on_device(array: Array) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            return (tensor.float() if tensor.is_floating_point() else tensor).to(device)  # some have no float64

        by_region, places = basis.by_region()
        back = np.argsort(by_region)
        columns = [on_device(rows.T) for _, rows in basis.regions()]
        component, frequency = np.divmod(quantiser.order, len(back))
        return cls(
            tuple(zip(places, columns, strict=True)),
            on_device(component * len(back) + back[frequency]),
            on_device(back),
            on_device(basis.centre[:, None, None]),
            on_device(cosine_matrix(level.height)),
            on_device(cosine_matrix(level.width)),
            on_device(quantiser.shift[quantiser.bands].T),
        )

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Normalised features. Shapes: (B, K, F), by region -> (B, C, h, w)."""
        parts = [torch.matmul(columns, coefficients[:, : columns.shape[1], place]) for place, columns in self.regions]
        waves = torch.cat(parts, dim=2)[:, :, self.back]
        maps = waves.reshape(*waves.shape[:2], len(self.down), len(self.across))
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


def _transform(codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    assert isinstance(codec, TransformLevel)
    symbols, norm, wide = parts[SYMBOLS].float(), parts[NORM], codec.parameters.wide
    basis, num_cells = _basis_of(codec, symbols.device), codec.level.height * codec.level.width
    numbers = symbols[:, : codec.parameters.symbols]
    numbers[:, :wide] += 256 * symbols[:, codec.parameters.symbols :]
    shift = torch.where(numbers.abs() > 1, basis.shift[1], basis.shift[0])
    coefficients = numbers.new_zeros(len(numbers), codec.parameters.components * num_cells)
    coefficients[:, basis.order] = (numbers - numbers.sign() * shift) * codec.parameters.step
    with _whole_float32(symbols.device):
        normal = basis.inverse(coefficients.reshape(len(numbers), codec.parameters.components, num_cells))
    deviation, mean = (norm[:, place, None, None, None] for place in (0, 1))
    return _rounded(normal * deviation + mean, codec.level.dtype)


@contextmanager
def _whole_float32(device: torch.device) -> Iterator[None]:
    """Products in all of float32's digits, whatever the process has chosen for itself."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


DECODERS: dict[str, Decode] = {"cast": _cast, INT8: _int8, TOPK: _topk, TRANSFORM: _transform}
_ROWS = "rows"  # sent beside the parts of a piece that is not the whole batch


_PACKED, _ENDS = "packed/", "ends/"  # before the name of a part, of its chunks as they are stored


def unpacks_rans(device: torch.device) -> bool:
    """Whether chunks under rans are decoded there: on a GPU of CUDA, by Triton."""
    return device.type == "cuda" and find_spec("triton") is not None and _builds_kernel(str(device))


@cache
def _builds_kernel(device: str) -> bool:
    """Whether Triton makes its program there: it calls a C compiler, which small containers lack. If not, says so."""
    from dtpipe.distill.stream.rans import try_on_device

    try:
        try_on_device(torch.device(device))
    except Exception as err:  # compilers, drivers and Triton have many kinds
        why = (str(err).splitlines() or [type(err).__name__])[0]
        _log.warning(
            "the CPU decodes what rans has coded, which takes its cores: Triton cannot make its program for %s (%s); "
            "most often it needs a C compiler: install gcc",
            device,
            why,
        )
        return False
    return True


def keep_packed(source: FeatureSource, device: torch.device) -> None:
    """Have the datasets of a source leave chunks under rans as they are stored, where the device decodes them."""
    if isinstance(source, MismatchedPairs):
        keep_packed(source.source, device)
    for part in source.parts if isinstance(source, JoinedDataset | ConcatDataset) else (source,):
        if isinstance(part, FeatureDataset):
            part.keeps_packed = unpacks_rans(device)


@dataclass(frozen=True)
class _SentPiece:
    codec: LevelCodec
    parts: Sent
    packed: Mapping[str, RansTables]
    """Tables of the parts that cross as they are stored."""


@dataclass(frozen=True)
class SentLevels:
    """Coded levels on their way to the device, to become features there."""

    num_rows: int
    pieces: Mapping[str, Sequence[_SentPiece]]

    @classmethod
    def send(cls, coded: CodedLevels, copies: DeviceCopies) -> SentLevels:
        """Start copying; for any thread."""
        pieces = {name: [_send(piece, copies) for piece in of_level] for name, of_level in coded.pieces.items()}
        return cls(coded.num_rows, pieces)

    def receive(self, copies: DeviceCopies) -> dict[str, Tensor]:
        """Features by level, on the current stream. Shapes: -> (B, C, h, w), in the level's dtype."""
        return {name: self._level(of_level, copies) for name, of_level in self.pieces.items()}

    def _level(self, pieces: Sequence[_SentPiece], copies: DeviceCopies) -> Tensor:
        decoded = [_decode(piece, copies) for piece in pieces]
        rows, values = decoded[0]
        if rows is None:
            return values
        features = values.new_empty((self.num_rows, *values.shape[1:]))
        for rows, values in decoded:
            features[rows] = values
        return features


def _decode(piece: _SentPiece, copies: DeviceCopies) -> tuple[Tensor | None, Tensor]:
    """Which samples of the batch, None for all, and their features."""
    parts = copies.receive(piece.parts)
    rows = parts.pop(_ROWS, None)
    decode = DECODERS.get(piece.codec.level.codec.name, _cast)  # decoded already where there is none
    if not piece.packed:
        return rows, decode(piece.codec, parts)
    from dtpipe.distill.stream.rans import device_tables, unpack_on_device

    whole = None
    for part, tables in piece.packed.items():
        data, ends = parts.pop(_PACKED + part), parts.pop(_ENDS + part)
        parts[part], fits = unpack_on_device(data, ends, device_tables(tables, data.device))
        whole = fits if whole is None else whole & fits
    assert whole is not None, "something is packed"
    features = decode(piece.codec, parts)  # of a chunk that is none, though its checksum fits, NaN stops the training
    return rows, torch.where(whole[:, None, None, None], features, float("nan"))


def decode_on_device(codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    """Features of parts that are on a device already. Shapes: {part: (B, ..)} -> (B, C, h, w), in the level's dtype."""
    decode = DECODERS.get(codec.level.codec.name)
    if decode is not None:
        return decode(codec, parts)
    decoded = decode_level(codec, {name: values.cpu().numpy() for name, values in parts.items()})
    return torch.from_numpy(np.ascontiguousarray(decoded)).to(parts[SYMBOLS].device)


def _send(piece: CodedPiece, copies: DeviceCopies) -> _SentPiece:
    packed = piece.packed if piece.codec.level.codec.name in DECODERS and unpacks_rans(copies.device) else {}
    parts = {**piece.parts} if packed else _on_host(piece)
    for part, chunks in packed.items():
        parts |= {_PACKED + part: chunks.data, _ENDS + part: chunks.ends}
    if piece.rows is not None:
        parts[_ROWS] = piece.rows
    return _SentPiece(piece.codec, copies.send(parts), {part: chunks.tables for part, chunks in packed.items()})


def _on_host(piece: CodedPiece) -> dict[str, Array]:
    """Parts as they are, or features where the device cannot decode."""
    known, parts = piece.codec.level.codec.name in DECODERS, piece.unpacked()
    return dict(parts) if known else {SYMBOLS: decode_level(piece.codec, parts)}
