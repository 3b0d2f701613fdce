"""A folder on a local disk that keeps objects of remote datasets, up to a number of bytes; for many processes at once.

One rule: nothing here is trusted. An object is named by its digest, and whoever reads one compares each chunk with the
manifest as always; what is damaged is dropped and fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from blake3 import blake3

from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.store.open_files import OpenFile, ProcessLock
from dtpipe.manifests.store.publish import is_unique_temporary, rename, unique_temporary

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 16 * 2**20
_BLOCKS_AT_ONCE = 4
_CLOCK_S = 1.0  # a file system's clock may be so much behind
_LOCK = ".lock"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Fetch = Callable[[list[tuple[int, int]]], list[bytes]]
"""(offset, size) of some ranges to their bytes."""


class ObjectCache:
    """Objects as files called by their blake3, as many as fit; for many threads, picklable.

    Those of datasets that are read with it stay, and once they fill it no more of them are fetched: to drop one for
    another would fetch whole objects in every epoch. Others make room, those first that were used least lately, unless
    another process has used them since this was made.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._since_s, self._in_use = time.time() - _CLOCK_S, set[str]()
        self._too_large = most_bytes + 1  # objects of so many bytes have no room
        self._telling, self._told = ProcessLock(), False

    def claim(self, digests: Iterable[str]) -> None:
        """These objects are of a dataset that is read, and make no room for others."""
        self._in_use.update(digests)

    def open(self, digest: str, size: int, fetch: Fetch) -> OpenFile | None:
        """An object as a file, fetched whole where it is not there; one process fetches it and others wait.

        None where it cannot be kept: it has no room, or is not what its digest says.
        Raises: StoreError where the folder cannot be written; what `fetch` raises.
        """
        path = self.folder / digest
        try:
            if (file := _opened(path, size)) is not None or size >= self._too_large:
                return file
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{digest[:2]}{_LOCK}"):
                if (file := _opened(path, size)) is None and self._fetch(path, digest, size, fetch):
                    file = _opened(path, size)
            return file
        except OSError as err:
            if err.errno in _DISK_FULL:
                self._end_fetching(err)
                return None
            raise StoreError(
                f"{self.folder}: the cache of remote data cannot be written: {err.strerror or err}; give it another "
                "folder or fewer bytes, or leave it out"
            ) from err

    def drop(self, digest: str, file: OpenFile) -> None:
        """Forget an object that proved damaged as `file`; not what another process has put in its place."""
        path = self.folder / digest
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.descriptor), path.stat()):
                _free(path)
                self._too_large = self.most_bytes + 1

    def _end_fetching(self, err: OSError) -> None:
        """Read what is there and add nothing; said once."""
        self._too_large = 0
        with self._telling:
            told, self._told = self._told, True
        if not told:
            _log.warning(
                "%s: nothing more can be kept in the cache of remote data (%s); the rest is read from the store; free "
                "some space, or give the cache fewer bytes",
                self.folder,
                err.strerror or err,
            )

    def _fetch(self, path: Path, digest: str, size: int, fetch: Fetch) -> bool:
        """Whether the object is there now, as its digest says."""
        _free(path)  # it is not of this size
        written = path.with_name(unique_temporary(path))
        if not self._make_room(written, size):
            return False
        try:
            if _write(written, size, fetch) != digest:
                return False
            with _locked(self.folder / _LOCK):  # no name changes while others count
                rename(written, path)
            return True
        except FileNotFoundError:  # others needed the room
            return False
        finally:
            written.unlink(missing_ok=True)

    def _make_room(self, written: Path, size: int) -> bool:
        """Whether so many bytes fit, by what can be dropped; they are then taken, so that others count them."""
        with _locked(self.folder / _LOCK):
            kept = sorted(_kept(self.folder), key=lambda item: item[1].st_mtime)
            lacking = sum(status.st_size for _, status in kept) + size - self.most_bytes
            unused = [(path, status.st_size) for path, status in kept if self._is_unused(path, status)]
            if lacking > sum(size for _, size in unused):
                self._too_large = min(self._too_large, size)
                return False
            for path, dropped in unused:
                if lacking <= 0:
                    break
                _free(path)
                lacking -= dropped
            with written.open("xb") as file:
                file.truncate(size)
            return True

    def _is_unused(self, path: Path, status: os.stat_result) -> bool:
        return path.name not in self._in_use and status.st_mtime < self._since_s


def _opened(path: Path, size: int) -> OpenFile | None:
    """A kept object, marked as used; None where it is not there or of another size."""
    try:
        file = OpenFile(path)
    except FileNotFoundError:
        return None
    if os.fstat(file.descriptor).st_size != size:
        return None
    with contextlib.suppress(OSError):  # where nothing may be written, nothing is dropped either
        os.utime(path)
    return file


def _write(written: Path, size: int, fetch: Fetch) -> str:
    """Write an object into a file that is there; its digest."""
    hasher = blake3()
    with written.open("r+b") as file:
        for ranges in _ranges(size):
            for data in fetch(ranges):
                hasher.update(data)
                file.write(data)
    return hasher.hexdigest()


def _free(path: Path) -> None:
    """Drop a file and give its blocks back, which a descriptor would keep: who has it open finds it cut."""
    with contextlib.suppress(OSError):
        os.truncate(path, 0)
    path.unlink(missing_ok=True)


def _ranges(size: int) -> Iterator[list[tuple[int, int]]]:
    starts = range(0, size, _BLOCK_BYTES)
    for first in range(0, len(starts), _BLOCKS_AT_ONCE):
        yield [(start, min(_BLOCK_BYTES, size - start)) for start in starts[first : first + _BLOCKS_AT_ONCE]]


def _kept(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Objects, and what is being fetched or was when a process was killed."""
    for path in folder.iterdir():
        if is_unique_temporary(path.name) or _DIGEST.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time; the lock of a process that ends is free."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing leaves it to a child that was forked meanwhile
