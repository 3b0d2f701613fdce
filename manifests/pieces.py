"""Bytes that lie in pieces, so that nobody holds them a second time to have them in one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from blake3 import blake3

Pieces = Sequence[bytes]
"""One after the other they are the content."""
_BLOCK_BYTES = 1 << 20


def in_blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes with small pieces joined, so that a call on each is worth it; large ones are not copied."""
    small, size_bytes = list[bytes](), 0
    for piece in pieces:
        if small and (size_bytes >= _BLOCK_BYTES or len(piece) >= _BLOCK_BYTES):
            yield b"".join(small)
            small, size_bytes = [], 0
        if len(piece) >= _BLOCK_BYTES:
            yield piece
        elif piece:
            small.append(piece)
            size_bytes += len(piece)
    if small:
        yield b"".join(small)


def blake3_of(pieces: Iterable[bytes]) -> str:
    """blake3 of the content as 64 hexadecimal digits."""
    digest = blake3()
    for block in in_blocks(pieces):
        digest.update(block)
    return digest.hexdigest()
