"""From symbols to features on the training device: symbols cross to it, and are decoded there.

One rule: a decoder gives what its codec's reference gives. Levels of a codec without one are decoded by the reference
before they cross.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dtpipe.distill.stream.transfer import DeviceCopies, Sent
from dtpipe.manifests.codecs.base import SYMBOLS, Arrays, LevelCodec, decode_level
from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.codecs.topk import CLASSES, REST, TOPK

Decode = Callable[[LevelCodec, Mapping[str, Tensor]], Tensor]
"""(codec, parts of (B, C, h, w)) -> features (B, C, h, w), in the level's dtype."""


def _cast(_codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    return parts[SYMBOLS]


def _topk(codec: LevelCodec, parts: Mapping[str, Tensor]) -> Tensor:
    rest, level = parts[REST], codec.level
    logits = rest.expand(len(rest), level.channels, level.height, level.width)
    return logits.scatter(1, parts[CLASSES].long(), parts[SYMBOLS])


DECODERS: dict[str, Decode] = {"cast": _cast, TOPK: _topk}
_ROWS = "rows"  # sent beside the parts of a piece that is not the whole batch


@dataclass(frozen=True)
class _SentPiece:
    codec: LevelCodec
    parts: Sent


@dataclass(frozen=True)
class SentLevels:
    """Coded levels on their way to the device, to become features there."""

    num_rows: int
    pieces: Mapping[str, Sequence[_SentPiece]]

    @classmethod
    def send(cls, coded: CodedLevels, copies: DeviceCopies) -> SentLevels:
        """Start copying; for any thread."""
        pieces = {
            name: [_SentPiece(piece.codec, copies.send(_to_send(piece))) for piece in of_level]
            for name, of_level in coded.pieces.items()
        }
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
    return rows, decode(piece.codec, parts)


def _to_send(piece: CodedPiece) -> Arrays:
    """Parts as they are, or features where the device cannot decode; and the rows, where these are not all."""
    known = piece.codec.level.codec.name in DECODERS
    parts = dict(piece.parts) if known else {SYMBOLS: decode_level(piece.codec, piece.parts)}
    return parts if piece.rows is None else {**parts, _ROWS: piece.rows}
