"""Files of a dataset on a local or mounted disk: published whole by a rename or a hard link, and on disk when we say so.

One rule: a name never shows half a file. Bytes go to a temporary name in the same folder, are synced, then take the name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtpipe.manifests.store.faults import fault_point

_TEMPORARY = re.compile(
    r"\.probe-[0-9a-f]{16}|\..+\.[0-9a-f]{12}\.tmp"
)  # no looser: these files are swept, those of others are not ours


@dataclass(frozen=True)
class ObjectStat:
    """What a store tells of an object without reading it."""

    size: int  # bytes
    identity: str  # changes when the object is written again


def is_temporary(name: str) -> bool:
    """True for names that are no part of a dataset: half-written files and probes."""
    return _TEMPORARY.fullmatch(name.rpartition("/")[2]) is not None


@dataclass(frozen=True)
class LocalFiles:
    """Objects as files under `root`. Methods raise OSError; `Store` turns it into ours."""

    root: Path

    def read(self, name: str) -> bytes:
        """The whole file."""
        return (self.root / name).read_bytes()

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """Each (name, offset, size); shorter where the file ends."""
        return [self._read_range(*wanted) for wanted in ranges]

    def write(self, name: str, data: bytes) -> ObjectStat:
        """Write or replace a file whole."""
        path = self.root / name
        with _temporary(path, data) as temporary:
            written = _stat_of(temporary.stat())  # before others can replace it; a rename keeps inode and time
            temporary.replace(path)
        _sync_folder(path.parent)
        return written

    def create(self, name: str, data: bytes) -> bool:
        """Write a file whole unless it exists; True if this call made it."""
        path = self.root / name
        with _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if temporary.stat().st_nlink != 2:  # 2: an NFS server linked it and the answer was lost
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

    def stat(self, name: str) -> ObjectStat:
        """Size and identity of one file."""
        found = (self.root / name).stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(name)
        return _stat_of(found)

    def stats(self, prefix: str) -> dict[str, ObjectStat]:
        """All files whose name starts with prefix, temporary ones too."""
        found = {}
        for name in self._walk(prefix):
            with contextlib.suppress(FileNotFoundError):  # temporary files come and go
                found[name] = self.stat(name)
        return found

    def names(self, prefix: str) -> list[str]:
        """Names of all files that start with prefix, temporary ones too."""
        return list(self._walk(prefix))

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        (self.root / old).replace(self.root / new)
        _sync_folder((self.root / new).parent)

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone is fine."""
        (self.root / name).unlink(missing_ok=True)

    def _read_range(self, name: str, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        with (self.root / name).open("rb", buffering=0) as file:
            while size > 0 and (part := os.pread(file.fileno(), size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _walk(self, prefix: str) -> Iterator[str]:
        folder = self.root / prefix.rpartition("/")[0]
        for base, _, files in os.walk(folder, onerror=_raise_unless_gone):
            for file in files:
                name = (Path(base) / file).relative_to(self.root).as_posix()
                if name.startswith(prefix):
                    yield name


def _raise_unless_gone(err: OSError) -> None:
    if not isinstance(err, FileNotFoundError):
        raise err


def _stat_of(found: os.stat_result) -> ObjectStat:
    return ObjectStat(size=found.st_size, identity=f"{found.st_mtime_ns}-{found.st_ino}")


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A whole, synced temporary file beside `path`; gone afterwards if it was not renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        fault_point("store.temporary")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


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
