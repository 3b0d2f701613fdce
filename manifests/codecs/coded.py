"""Levels as they were read: symbols, with the codecs that turn them into features.

One rule: nobody computes with symbols. `CodedLevels` is no array and gives none; `decode` gives features in numpy, and
`distill.stream.decode` gives the same on a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import Array, Arrays, LevelCodec, array_name, decode_level
from dtpipe.manifests.codecs.rans_tables import RansTables


@dataclass(frozen=True)
class PackedChunks:
    """Chunks of symbols under `rans` as they are stored, each of which was compared with its checksum."""

    data: NDArray[np.uint8]
    """All of them, one behind the other."""
    starts: NDArray[np.int64]
    """(N,): where each begins."""
    tables: RansTables

    @property
    def ends(self) -> NDArray[np.int64]:
        """(N,)."""
        return np.append(self.starts[1:], len(self.data)) if len(self.starts) else self.starts

    def unpack(self) -> NDArray[np.int8]:
        """The symbols. Shapes: -> [N, n]. Raises: DamagedDataError for a chunk that is none of these tables."""
        from dtpipe.manifests.codecs.rans import decompress_joined

        return decompress_joined(self.data, self.starts, self.ends, self.tables)


@dataclass(frozen=True)
class CodedPiece:
    """Samples of one level under one codec."""

    codec: LevelCodec
    parts: Arrays
    """Symbols and what goes with them; for decoders only."""
    rows: NDArray[np.int64] | None = None
    """Which samples of the batch these are; None: all, in order."""
    packed: Mapping[str, PackedChunks] = field(default_factory=dict)
    """The parts whose chunks were left as they are stored."""

    def unpacked(self) -> Arrays:
        """All parts. Raises: as `PackedChunks.unpack`."""
        return {**self.parts, **{part: chunks.unpack() for part, chunks in self.packed.items()}}


class CodedLevels:
    """Levels of some samples. The samples of one level may lie under several codecs, where datasets were joined."""

    def __init__(self, num_rows: int, pieces: Mapping[str, Sequence[CodedPiece]]) -> None:
        self.num_rows, self.pieces = num_rows, {name: tuple(of_level) for name, of_level in pieces.items()}

    @classmethod
    def of_arrays(
        cls,
        num_rows: int,
        codecs: Mapping[str, LevelCodec],
        arrays: Arrays,
        packed: Mapping[str, PackedChunks] | None = None,
    ) -> CodedLevels:
        """All samples of each level under its one codec; `arrays` by their stored names, or `packed`."""
        pieces = {}
        for name, codec in codecs.items():
            stored = {part: array_name(name, part) for part in codec.parts}
            left = {part: packed[array] for part, array in stored.items() if packed and array in packed}
            parts = {part: arrays[array] for part, array in stored.items() if part not in left}
            pieces[name] = [CodedPiece(codec, parts, None, left)]
        return cls(num_rows, pieces)

    def __array__(self, *_args: object, **_options: object) -> Array:
        raise TypeError("coded levels hold symbols, no features; call decode()")

    @property
    def names(self) -> tuple[str, ...]:
        """The levels, in the order they were asked for."""
        return tuple(self.pieces)

    def decode(self) -> dict[str, Array]:
        """Features by level, by the reference. Shapes: -> {level: [B, C, H, W], in the level's dtype}.

        Raises: ShapeError when the arrays are not those of their codec.
        """
        return {name: self._decode_level(pieces) for name, pieces in self.pieces.items()}

    def error(self) -> dict[str, NDArray[np.float64]]:
        """What the codecs state: how far decoded features may be from true ones. Shapes: -> {level: [B]}."""
        errors = {name: np.empty(self.num_rows, np.float64) for name in self.pieces}
        for name, pieces in self.pieces.items():
            for piece in pieces:
                errors[name][slice(None) if piece.rows is None else piece.rows] = piece.codec.error(piece.unpacked())
        return errors

    def _decode_level(self, pieces: Sequence[CodedPiece]) -> Array:
        decoded = [decode_level(piece.codec, piece.unpacked()) for piece in pieces]
        if pieces[0].rows is None:
            return decoded[0]
        features: Array = np.empty((self.num_rows, *decoded[0].shape[1:]), decoded[0].dtype)
        for piece, values in zip(pieces, decoded, strict=True):
            features[piece.rows] = values
        return features
