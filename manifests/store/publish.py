"""Files on a local or mounted disk that are there whole or not at all, after a kill and after a power cut too.

One rule: bytes go to a temporary name in the same folder, are brought to disk, then take the name. No other module of
dtpipe renames a file. Functions raise OSError; the caller says what could not be written, and what to do.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtpipe.manifests.pieces import Pieces, in_blocks
from dtpipe.manifests.store.faults import fault_point

Content = bytes | str | Pieces
"""Of a file; text is written as UTF-8."""

_UNIQUE = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # no looser: these files are swept, those of others are not ours


def unique_temporary(path: Path) -> str:
    """A temporary name that no other process uses, for a file that several may write at once."""
    return f".{path.name[:100]}.{secrets.token_hex(6)}.tmp"


def is_unique_temporary(name: str) -> bool:
    """True for what `unique_temporary` gives."""
    return _UNIQUE.fullmatch(name) is not None


@contextmanager
def whole_file(path: Path, temporary: str | None = None) -> Iterator[Path]:
    """The path that a block writes to: the file takes the name `path` when the block ends, and is gone after an error.

    `temporary` is its name until then, by default `.NAME.tmp`: the next process replaces what a killed one left there.
    """
    with _temporary(path, temporary) as written:
        yield written
        with written.open("rb") as file:
            os.fsync(file.fileno())
        fault_point("store.temporary")
        written.replace(path)
    _sync_folder(path.parent)


@contextmanager
def whole_files(folder: Path, temporary: str) -> Iterator[Path]:
    """A folder inside `folder` that a block writes to: its files take their places when the block ends, one by one.

    `temporary` is its name until then; after an error nothing of it is left.
    """
    written = folder / temporary
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        for path in sorted(filter(Path.is_file, written.rglob("*"))):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            place = folder / path.relative_to(written)
            place.parent.mkdir(parents=True, exist_ok=True)
            rename(path, place)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def write_whole(path: Path, content: Content, temporary: str | None = None) -> os.stat_result:
    """Write or replace a file.

    Returns the status of what this call wrote, even if others replace it at once.
    """
    with _temporary(path, temporary) as written:
        _write(written, content)
        status = written.stat()  # a rename keeps inode and time
        written.replace(path)
    _sync_folder(path.parent)
    return status


def create_whole(path: Path, content: Content) -> bool:
    """Write a file unless there is one of this name; True if this call made it."""
    with _temporary(path, unique_temporary(path)) as written:
        _write(written, content)
        try:
            os.link(written, path)
        except FileExistsError:
            if written.stat().st_nlink != 2:  # 2: an NFS server linked it and the answer was lost
                return False
        except OSError as err:
            if err.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise OSError(
                    err.errno,
                    "the file system has no hard links, which put-if-absent needs; use the object store's URL",
                ) from err
            raise
    _sync_folder(path.parent)
    return True


def rename(old: Path, new: Path) -> None:
    """Give a file another name, or a folder one that no folder with content has."""
    old.replace(new)
    _sync_folder(new.parent)


@contextmanager
def _temporary(path: Path, name: str | None) -> Iterator[Path]:
    """A free name beside `path`; what lies there afterwards is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(name or f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # never written through: a killed process may have left a hard link
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write(temporary: Path, content: Content) -> None:
    whole = content.encode() if isinstance(content, str) else content
    with temporary.open("xb", buffering=0) as file:
        for block in in_blocks([whole] if isinstance(whole, bytes) else whole):
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    fault_point("store.temporary")


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut; file systems that cannot sync folders are let be."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
