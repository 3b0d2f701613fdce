"""The folder or URL that holds one dataset, with the few promises everything else is built on.

One rule: `write` and `create` publish an object whole or not at all, and `create` never replaces. Names are POSIX paths
inside the dataset.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Protocol

from dtpipe.manifests.documents import what_lies_at
from dtpipe.manifests.errors import DamagedDataError, DtpipeError, ManifestError, MissingObjectError, StoreError
from dtpipe.manifests.pieces import Pieces
from dtpipe.manifests.store.local import LocalFiles, ObjectStat, is_temporary
from dtpipe.manifests.store.open_files import OpenFile
from dtpipe.manifests.store.paths import path_on_disk
from dtpipe.manifests.store.patience import LOCAL_PATIENCE, Patience
from dtpipe.manifests.store.reasons import NO_STORE, Reason, reason_of
from dtpipe.manifests.store.remote import RemoteFiles

LOCK_FOLDER = "lock/"


class _Files(Protocol):
    def read(self, name: str) -> bytes: ...
    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]: ...
    def write(self, name: str, data: bytes | Pieces) -> ObjectStat: ...
    def create(self, name: str, data: bytes) -> bool: ...
    def stat(self, name: str) -> ObjectStat: ...
    def stats(self, prefix: str) -> dict[str, ObjectStat]: ...
    def names(self, prefix: str) -> list[str]: ...
    def rename(self, old: str, new: str) -> None: ...
    def delete(self, name: str) -> None: ...


class Store:
    """One dataset folder, local or remote; safe to use from many threads, picklable, and usable after a fork.

    Raises (every method): MissingObjectError for an absent object; StoreError when the store is full, read-only,
    forbidden or out of reach; ManifestError for a name that leaves the dataset.
    """

    def __init__(self, url: str | os.PathLike[str], patience: Patience | None = None) -> None:
        """`patience`: deadlines; by default those of `store.patience` for object stores or for disks."""
        self.local = path_on_disk(os.fspath(url))
        self.url = str(self.local) if self.local else os.fspath(url).rstrip("/")
        self._patience = patience
        self._files: _Files = (
            LocalFiles(self.local, patience or LOCAL_PATIENCE) if self.local else RemoteFiles(self.url, patience)
        )

    def __reduce__(self) -> tuple[type[Store], tuple[str, Patience | None]]:
        return Store, (self.url, self._patience)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def where(self, name: str) -> str:
        """An object's full name, for messages."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        with self._reading(name):
            return self._files.read(name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`.

        Raises: DamagedDataError when the object ends before.
        """
        return self.read_ranges([(name, offset, size)])[0]

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Exactly the bytes of each (name, offset, size); a remote store is asked for all at once.

        Raises: DamagedDataError when an object ends before.
        """
        for name, offset, size in ranges:
            if offset < 0 or size < 0:
                raise ManifestError(
                    f"{self.where(name)} has no range of {size} bytes at {offset}; the entry that names it is damaged"
                )
        filled = [(name, offset, size) for name, offset, size in ranges if size > 0]
        with self._reading(*dict.fromkeys(name for name, _, _ in filled)):
            parts = iter(self._files.read_ranges(filled) if filled else [])
        return [self._whole(next(parts) if size else b"", name, offset, size) for name, offset, size in ranges]

    def open(self, name: str) -> OpenFile:
        """An object of a local store, to read from. Errors of reading itself are left to `read_range`."""
        assert self.local is not None, "objects of a remote store are no files"
        with self._reading(name):
            return OpenFile(self.local / name)

    def write(self, name: str, data: bytes | Pieces) -> ObjectStat:
        """Write an object whole, from memory and only once, replacing it if it exists. It is durable when this
        returns.

        Returns size and identity of what this call wrote, which `stat` gives only if nobody wrote in between.
        """
        with self._writing(name):
            return self._files.write(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object whole unless it exists; True if this call made it.

        After an attempt whose answer was lost, an object of the same content counts as made by this call.
        """
        with self._writing(name):
            return self._files.create(name, data)

    def exists(self, name: str) -> bool:
        """True if the object is there."""
        try:
            self.stat(name)
        except MissingObjectError:
            return False
        return True

    def stat(self, name: str) -> ObjectStat:
        """Size and identity, without reading."""
        with self._reading(name):
            return self._files.stat(name)

    def size(self, name: str) -> int:
        """Bytes of an object."""
        return self.stat(name).size

    def identity(self, name: str) -> str:
        """The etag, or time and inode: changes when the object is written again (S3: when other bytes are written)."""
        return self.stat(name).identity

    def list(self, prefix: str = "") -> list[str]:
        """Names that start with prefix, sorted, all folders down, without temporary files."""
        with self._reading(prefix):
            return sorted(name for name in self._files.names(prefix) if not is_temporary(name))

    def stats(self, prefix: str = "") -> dict[str, ObjectStat]:
        """As `list`, with size and identity; a remote store answers this in few requests."""
        with self._reading(prefix):
            stats = self._files.stats(prefix)
        return {name: stats[name] for name in sorted(stats) if not is_temporary(name)}

    def rename(self, old: str, new: str) -> None:
        """Give an object another name. A kill leaves the old, the new, or (remote) both."""
        self.stat(old)
        with self._writing(new):
            self._files.rename(old, new)

    def delete(self, name: str) -> None:
        """Remove a lock, a probe or a temporary file. Data is never deleted."""
        assert is_temporary(name) or name.startswith(LOCK_FOLDER), f"{name} is data"
        with self._writing(name):
            self._files.delete(name)

    def sweep(self) -> int:
        """Remove what killed local writers left half-written, and return how many files that were.

        A deposed writer that is still at it fails.
        """
        if self.local is None:
            return 0
        with self._writing(""):
            temporary = [name for name in self._files.names("") if is_temporary(name)]
            half_written = [
                name
                for name in temporary
                if not name.startswith(LOCK_FOLDER) and ".probe-" not in name  # others may be at those
            ]
            for name in half_written:
                self._files.delete(name)
        return len(half_written)

    def probe(self) -> None:
        """Write, read and delete a small object, and see that put-if-absent holds.

        Raises: StoreError saying which promise the store does not keep.
        """
        name, first, second = f".probe-{secrets.token_hex(8)}", b"first", b"second!"
        try:
            self._expect(self.create(name, first), "a new object could not be created")
            self._expect(not self.create(name, second), _IGNORES_CREATE)
            self._expect(self.read(name) == first, _IGNORES_CREATE)
            self.write(name, second)
            self._expect(
                self.read(name) == second and self.size(name) == len(second), "an object just written reads otherwise"
            )
            self._expect(self.read_range(name, 2, 3) == second[2:5], "a range reads otherwise than the whole")
        finally:
            with contextlib.suppress(StoreError):
                self.delete(name)
        self._expect(not self.exists(name), "a deleted object is still there")

    def _expect(self, kept: bool, broken: str) -> None:
        if not kept:
            raise StoreError(f"{self.url}: {broken}; a dataset cannot be written safely here, use another store")

    def _whole(self, part: bytes, name: str, offset: int, size: int) -> bytes:
        if len(part) != size:
            raise DamagedDataError(
                f"{self.where(name)}: {len(part)} of {size} bytes at {offset}: the object was cut short; "
                f"run `dtpipe verify --repair {self.url}` and extract again"
            )
        return part

    @contextlib.contextmanager
    def _reading(self, *names: str) -> Iterator[None]:
        for name in names:
            self._check_name(name)
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as err:
            reason = reason_of(err)
            if reason.code in NO_STORE or reason.passes:
                raise self._cannot("read", ", ".join(names), reason) from err
            raise self._missing(names) from err
        except DtpipeError:
            raise
        except Exception as err:
            if self.local and not isinstance(err, OSError):
                raise
            if getattr(err, "errno", None) == errno.ELOOP:
                raise self._missing(names) from err
            raise self._cannot("read", ", ".join(names), reason_of(err)) from err

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        self._check_name(name)
        try:
            yield
        except DtpipeError:
            raise
        except Exception as err:  # client libraries raise many types of their own
            if self.local and not isinstance(err, OSError):
                raise
            raise self._cannot("written", name, reason_of(err)) from err

    def _missing(self, names: Sequence[str]) -> MissingObjectError:
        """What to say of objects that are not there, or in whose place something else lies."""
        odd = [(name, what) for name in names if self.local and (what := what_lies_at(self.local / name))]
        if odd:
            lies = ", ".join(f"{self.where(name)} {what}" for name, what in odd)
            return MissingObjectError(f"{lies}; move it away, then run `dtpipe verify --repair {self.url}`")
        lost = ", ".join(map(self.where, names))
        return MissingObjectError(f"{lost} is missing; run `dtpipe verify --repair {self.url}`, or check the path")

    def _cannot(self, done: str, name: str, reason: Reason) -> StoreError:
        return StoreError(f"{self.where(name)} cannot be {done}: {reason}; {reason.advice}")

    def _check_name(self, name: str) -> None:
        if name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise ManifestError(
                f"{self.url}: object name {name!r} leaves the dataset; the file that gives it is damaged"
            )


_IGNORES_CREATE = (
    "the store ignores put-if-absent (S3: needs s3fs >= 2025.7 and a server that honours If-None-Match), "
    "so two writers could not be told apart"
)
