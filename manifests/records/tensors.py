"""safetensors files that carry the blake3 of the whole file in their metadata, where every reader passes it over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.records.bounded import regular_size

DIGEST_KEY = "dtpipe_blake3"
"""Of the metadata: the file's blake3, taken with `UNSEALED` in its place."""
UNSEALED = "0" * 64
"""What the metadata holds before the file is sealed."""

_FIELD = re.compile(rf'"{DIGEST_KEY}":"(.{{64}})"'.encode(), re.DOTALL)
_DIGITS = re.compile(rb'"[0-9a-f]{64}"')
_MOST_HEAD_BYTES = 100_000_000  # as the format says
_BLOCK_BYTES = 2**22


def seal_tensors(path: Path) -> None:
    """Put the digest into a file that was written with `UNSEALED` as its `DIGEST_KEY`."""
    with path.open("r+b") as file:
        head = _read_head(file)
        match = _FIELD.search(head)
        assert match is not None and match[1] == UNSEALED.encode(), f"{path} was written without {DIGEST_KEY}"
        digest = _digest(head, file)
        file.seek(match.start(1))
        file.write(digest)


def check_tensors(path: Path, remedy: str) -> None:
    """See that a sealed file is as it was written; one without a seal may be anything.

    Raises: DamagedDataError when it is no file or its bytes were changed; OSError when it cannot be read.
    """
    regular_size(path, remedy)
    with path.open("rb") as file:
        head = _read_head(file)
        match = _FIELD.search(head)
        if match is None and not _DIGITS.search(head):
            return
        unsealed = head[: match.start(1)] + UNSEALED.encode() + head[match.end(1) :] if match else b""
        if match is None or match[1] != _digest(unsealed, file):
            raise DamagedDataError(f"{path}: does not match its own digest: bytes were changed; {remedy}")


def _read_head(file: BinaryIO) -> bytes:
    """The size of the header and the header, as they stand in the file; what it says of its size may be false."""
    size = file.read(8)
    return size + file.read(min(int.from_bytes(size, "little"), _MOST_HEAD_BYTES))


def _digest(head: bytes, file: BinaryIO) -> bytes:
    """Of the head and what follows it in the file, as text."""
    hasher = blake3(head)
    while block := file.read(_BLOCK_BYTES):
        hasher.update(block)
    return hasher.hexdigest().encode()
