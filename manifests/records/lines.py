"""Files of JSON lines that grow: metrics.jsonl and commands.jsonl. Each line ends in a seal of its own.

A kill or a power cut leaves at most something without a line end, or NULs, at the file's end; that is no damage.
Older lines have no seal and are read as they are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.documents import Refusal, parse_json
from dtpipe.manifests.errors import DamagedDataError, StoreError
from dtpipe.manifests.records.bounded import read_bounded
from dtpipe.manifests.store.publish import write_whole

_MOST_BYTES = 256 * 2**20
_REFUSAL = Refusal(DamagedDataError, "restore the file, or delete this line to go on without it")
_SEALED = re.compile(rb'(\{.+), "seal": "([0-9a-f]{16})"\}', re.DOTALL)
_LOOKS_SEALED = re.compile(rb', "seal": ".{16}"\}?$|[0-9a-f]{16}"\}$', re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One whole line."""

    text: bytes
    """As it stands in the file, with its end."""
    record: dict[str, Any]
    """Its values, without the seal."""


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record, which holds something, as one sealed line.

    Raises: StoreError when the disk is full or unwritable; nothing of the line is left then.
    """
    text = json.dumps(record, allow_nan=False)
    line = f'{text[:-1]}, "seal": "{_digest(text.encode())}"}}\n'.encode()
    try:
        with path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) < len(line):
                    raise OSError("there is no room for a line")
            except OSError:
                file.truncate(size)
                raise
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; free or change the disk and run again") from err


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a file; none where there is no file.

    Raises: DamagedDataError naming file and line for anything else than JSON objects as they were written, or when it
    is no file or larger than 256 MiB; InputError when it may not be read.
    """
    try:
        data = read_bounded(path, _MOST_BYTES, "move it away, then run again: the run goes on without these lines")
    except FileNotFoundError:
        return []
    texts = data.split(b"\n")[:-1]  # what follows the last line end was not written whole
    return [Line(text + b"\n", _read(text, f"{path}, line {number}")) for number, text in enumerate(texts, 1)]


def keep_lines(path: Path, lines: Sequence[Line]) -> int:
    """Replace the file by some of its whole lines; the number of bytes at its end that were no whole line.

    Raises: StoreError when it cannot be written.
    """
    try:
        with path.open("rb") as file:
            torn = _torn_bytes(file)
        write_whole(path, b"".join(line.text for line in lines))
    except FileNotFoundError:
        return 0
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; free or change the disk and run again") from err
    return torn


def _torn_bytes(file: BinaryIO) -> int:
    """Bytes after the last line end."""
    end = left = file.seek(0, os.SEEK_END)
    while left:
        size = min(left, 2**16)
        left = file.seek(left - size)
        if (place := file.read(size).rfind(b"\n")) >= 0:
            return end - left - place - 1
    return end


def _read(text: bytes, where: str) -> dict[str, Any]:
    match = _SEALED.fullmatch(text)
    body = match[1] + b"}" if match else text
    try:
        record = parse_json(body.decode(), where, _REFUSAL)
    except (UnicodeDecodeError, DamagedDataError):
        record = None
    changed = _digest(body) != match[2].decode() if match else _LOOKS_SEALED.search(text[-40:])
    if changed or not isinstance(record, dict):
        what = "was changed since it was written" if changed else "is no JSON object"
        raise DamagedDataError(f"{where} {what}; {_REFUSAL.advice}")
    return record


def _digest(body: bytes) -> str:
    return blake3_hex(body)[:16]
