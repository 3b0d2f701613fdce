"""Files that end in the blake3 of all before it: checkpoints and run settings.

One rule of all records: the seal of a file lies in the file, so that one rename publishes both and a copy keeps both.
Readers of zip archives look for the archive's end from behind, and to YAML the seal is a comment. A file of an older
dtpipe has no seal; a single flipped bit cannot make a sealed file look like one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO

from blake3 import blake3

from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.records.bounded import read_bounded, regular_size

_NAME = b"dtpipe blake3 "
_SIZE = len(_NAME) + 65
_DIGITS = re.compile(rb"[0-9a-f]{64}\n")
_BLOCK_BYTES = 2**22
_MOST_TEXT_BYTES = 16 * 2**20
_HEAD = "# Sealed by its last line. To use it with changes, change a copy and give that with -c.\n"


class SealingFile:
    """A file opened for writing that digests what passes through; `seal` ends it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hasher = file, blake3()
        self.error: OSError | None = None
        """Why a write failed, where the caller turns it into an error of its own."""

    def write(self, data: bytes | memoryview) -> int:
        """As a file's."""
        self._hasher.update(data)
        try:
            return self._file.write(data)
        except OSError as err:
            self.error = err
            raise

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()

    def seal(self) -> None:
        """Write the seal; the file is complete."""
        self._file.write(_end(self._hasher.hexdigest()))


def is_sealed(path: Path, remedy: str) -> bool:
    """True for a file as it was sealed, False for one without a seal; it is read once.

    Raises: DamagedDataError when it is no file or its bytes were changed; OSError when it cannot be read.
    """
    left, hasher = regular_size(path, remedy) - _SIZE, blake3()
    if left < 0:
        return False
    with path.open("rb") as file:
        file.seek(left)
        end = file.read()
        if not _looks_sealed(end):
            return False
        file.seek(0)
        while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
            hasher.update(block)
            left -= len(block)
    if end != _end(hasher.hexdigest()):
        raise DamagedDataError(f"{path}: does not match its own digest: bytes were changed; {remedy}")
    return True


def seal_text(text: str) -> bytes:
    """Text whose lines may end in comments after `#`, with a first line that says so, and its seal as the last."""
    body = f"{_HEAD}{text.rstrip(os.linesep)}\n# ".encode()
    return body + _end(blake3_hex(body))


def read_text(path: Path, remedy: str) -> str:
    """The text of a file that `seal_text` made, or of an older one without a seal.

    Raises: FileNotFoundError; DamagedDataError naming the file when its bytes were changed; InputError when it may not
    be read.
    """
    data = read_bounded(path, _MOST_TEXT_BYTES, remedy)
    body, end = data[:-_SIZE], data[-_SIZE:]
    if (data.startswith(_HEAD.encode()) or _looks_sealed(end)) and end != _end(blake3_hex(body)):
        raise DamagedDataError(f"{path}: does not match its own digest: bytes were changed; {remedy}")
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        raise DamagedDataError(f"{path}: is no text ({err}); {remedy}") from err


def _end(digest: str) -> bytes:
    return _NAME + digest.encode() + b"\n"


def _looks_sealed(end: bytes) -> bool:
    """Either half of the seal is enough, so that damage to the other is seen."""
    return end.startswith(_NAME) or _DIGITS.fullmatch(end[-65:]) is not None
