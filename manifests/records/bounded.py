"""Reading a file whole, unless it is none or larger than what dtpipe writes there: a link may lead anywhere."""

from __future__ import annotations

import stat
from pathlib import Path

from dtpipe.manifests.documents import Refusal, why_not_read
from dtpipe.manifests.errors import DamagedDataError, InputError


def read_bounded(path: Path, most_bytes: int, remedy: str) -> bytes:
    """The bytes of a file of at most `most_bytes`; `remedy` ends the sentence on what is wrong.

    Raises: FileNotFoundError; DamagedDataError when it is no file or larger; InputError when it may not be read.
    """
    try:
        size = regular_size(path, remedy)
        if size > most_bytes:
            raise DamagedDataError(f"{path}: has {size} bytes, and at most {most_bytes} are read there; {remedy}")
        with path.open("rb") as file:
            return file.read(most_bytes)
    except OSError as err:
        if isinstance(err, FileNotFoundError) and not path.is_symlink():
            raise
        raise Refusal(InputError, remedy).of(path, why_not_read(path, err)) from err


def regular_size(path: Path, remedy: str) -> int:
    """Size in bytes. Raises: DamagedDataError for a folder, a device or a pipe; OSError as `Path.stat`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise DamagedDataError(f"{path}: is {kind}, not a file; {remedy}")
    return status.st_size
