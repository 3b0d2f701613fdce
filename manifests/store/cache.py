"""A folder on a local disk that keeps objects of remote datasets, up to a number of bytes; for many processes at once.

One rule: nothing here is trusted. An object is named by its digest, and whoever reads one compares each chunk with the
manifest as always; what is damaged is dropped and fetched again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.store.open_files import OpenFile
from dtpipe.manifests.store.publish import is_unique_temporary, rename, unique_temporary

_BLOCK_BYTES = 16 * 2**20
_BLOCKS_AT_ONCE = 4
_LOCK = ".lock"
Fetch = Callable[[list[tuple[int, int]]], list[bytes]]
"""(offset, size) of some ranges to their bytes."""


@dataclass(frozen=True)
class ObjectCache:
    """Objects as files called by their blake3; those that were used least lately make room."""

    folder: Path
    most_bytes: int

    def open(self, digest: str, size: int, fetch: Fetch) -> OpenFile | None:
        """An object as a file, fetched whole where it is not there; one process fetches it and others wait.

        None where it cannot be kept: it is larger than all that may be, or not what its digest says.
        Raises: StoreError where the folder cannot be written; what `fetch` raises.
        """
        path = self.folder / digest
        try:
            if (file := _opened(path, size)) is not None:
                return file
            if size > self.most_bytes:
                return None
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{digest[:2]}{_LOCK}"):
                if (file := _opened(path, size)) is None and self._fetch(path, digest, size, fetch):
                    file = _opened(path, size)
            return file
        except OSError as err:
            raise StoreError(
                f"{self.folder}: the cache of remote data cannot be written: {err.strerror or err}; give it another "
                "folder or fewer bytes, or leave it out"
            ) from err

    def drop(self, digest: str) -> None:
        """Forget an object that proved damaged. Who has it open reads on, and finds the same."""
        with contextlib.suppress(OSError):
            (self.folder / digest).unlink(missing_ok=True)

    def _fetch(self, path: Path, digest: str, size: int, fetch: Fetch) -> bool:
        """Whether the object is there now, as its digest says."""
        written, hasher = path.with_name(unique_temporary(path)), blake3()
        self._make_room(written, size)
        try:
            with written.open("r+b") as file:
                for ranges in _ranges(size):
                    for data in fetch(ranges):
                        hasher.update(data)
                        file.write(data)
            if hasher.hexdigest() != digest:
                return False
            with _locked(self.folder / _LOCK):  # no name changes while others count
                rename(written, path)
            return True
        except FileNotFoundError:  # others needed the room
            return False
        finally:
            written.unlink(missing_ok=True)

    def _make_room(self, written: Path, size: int) -> None:
        """Drop what was used least lately until so many bytes fit, and take them, so that others count them."""
        with _locked(self.folder / _LOCK):
            kept = sorted(_kept(self.folder), key=lambda item: item[1].st_mtime)
            left = sum(status.st_size for _, status in kept) + size - self.most_bytes
            for path, status in kept:
                if left <= 0:
                    break
                path.unlink(missing_ok=True)
                left -= status.st_size
            with written.open("xb") as file:
                file.truncate(size)


def _opened(path: Path, size: int) -> OpenFile | None:
    """A kept object, marked as used; None where it is not there or of another size."""
    try:
        file = OpenFile(path)
        if os.fstat(file.descriptor).st_size != size:
            return None
        os.utime(path)
    except FileNotFoundError:
        return None
    return file


def _ranges(size: int) -> Iterator[list[tuple[int, int]]]:
    starts = range(0, size, _BLOCK_BYTES)
    for first in range(0, len(starts), _BLOCKS_AT_ONCE):
        yield [(start, min(_BLOCK_BYTES, size - start)) for start in starts[first : first + _BLOCKS_AT_ONCE]]


def _kept(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Objects, and what is being fetched or was when a process was killed."""
    for path in folder.iterdir():
        if is_unique_temporary(path.name) or not path.name.endswith(_LOCK):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time; the lock of a process that ends is free."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
