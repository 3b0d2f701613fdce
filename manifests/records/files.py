"""A record of the files in a folder, by their blake3: for files that other libraries read and write.

One rule: the record is written last and read first. A folder without one, or whose record is older, is not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.records.bounded import regular_size
from dtpipe.manifests.records.document import read_document

TEACHER_RECORD = "train.json"
"""Beside a teacher that `dtpipe train-teacher` wrote."""
FILES = "files"
"""Field of a record: blake3 by path below the folder."""
_BLOCK_BYTES = 2**22


def file_digest(path: Path) -> str:
    """blake3 of a file, as 64 hexadecimal digits. Raises: OSError."""
    hasher = blake3()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Of all files below a folder. Raises: OSError."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def check_files(folder: Path, record: str, remedy: str) -> Mapping[str, Any]:
    """See that the files which a record in the folder names are those that were written; the record, empty without.

    Raises: DamagedDataError naming the file that is missing or was changed; InputError when the record may not be read.
    """
    try:
        content = read_document(folder / record, remedy)
    except FileNotFoundError:
        return {}
    for name, digest in (content.get(FILES) or {}).items():
        try:
            regular_size(folder / name, remedy)
            intact = file_digest(folder / name) == digest
        except OSError as err:
            raise DamagedDataError(f"{folder / name}: cannot be read ({err.strerror or err}); {remedy}") from err
        if not intact:
            raise DamagedDataError(f"{folder / name}: is not the file that {record} names; {remedy}")
    return content
