"""Files of a dataset on a local or mounted disk, with what `Store` needs of them: ranges, identities, put-if-absent."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dtpipe.manifests.pieces import Pieces
from dtpipe.manifests.store.patience import LOCAL_PATIENCE, Patience, Request, patiently
from dtpipe.manifests.store.publish import create_whole, is_unique_temporary, rename, unique_temporary, write_whole

_T = TypeVar("_T")
_PROBE = re.compile(r"\.probe-[0-9a-f]{16}")


@dataclass(frozen=True)
class ObjectStat:
    """What a store tells of an object without reading it."""

    size: int  # bytes
    identity: str  # changes when the object is written again


def is_temporary(name: str) -> bool:
    """True for names that are no part of a dataset: half-written files and probes."""
    name = name.rpartition("/")[2]
    return is_unique_temporary(name) or _PROBE.fullmatch(name) is not None


@dataclass(frozen=True)
class LocalFiles:
    """Objects as files under `root`. Methods raise OSError; `Store` turns it into ours.

    What a mount's server may mend (a stale handle, an I/O error, a time-out) is waited for briefly.
    """

    root: Path
    patience: Patience = LOCAL_PATIENCE

    def read(self, name: str) -> bytes:
        """The whole file."""
        return self._patiently("read", name, (self.root / name).read_bytes)

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """Each (name, offset, size); shorter where the file ends."""
        parts: dict[int, bytes] = {}

        def attempt() -> None:
            for idx in range(len(parts), len(ranges)):
                parts[idx] = self._read_range(*ranges[idx])

        self._patiently("read", ranges[0][0], attempt)
        return list(parts.values())

    def write(self, name: str, data: bytes | Pieces) -> ObjectStat:
        """Write or replace a file whole."""
        path = self.root / name
        status = self._patiently("write", name, lambda: write_whole(path, data, unique_temporary(path)))
        return _stat_of(status)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file whole unless it exists; True if this call made it, even if an error came after."""
        num_attempts = 0

        def attempt() -> bool:
            nonlocal num_attempts
            num_attempts += 1
            return create_whole(self.root / name, data)

        return self._patiently("create", name, attempt) or (num_attempts > 1 and self.read(name) == data)

    def _patiently(self, verb: str, name: str, attempt: Callable[[], _T]) -> _T:
        request = Request(str(self.root), verb, str(self.root / name))
        return patiently(lambda _limit_s: attempt(), request, self.patience)

    def stat(self, name: str) -> ObjectStat:
        """Size and identity of one file."""
        status = self._patiently("look at", name, (self.root / name).stat)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(name)
        return _stat_of(status)

    def stats(self, prefix: str) -> dict[str, ObjectStat]:
        """All files whose name starts with prefix, temporary ones too."""
        stats = {}
        for name in self.names(prefix):
            try:
                stats[name] = self.stat(name)
            except FileNotFoundError:  # temporary files come and go
                continue
            except OSError as err:
                if err.errno != errno.ELOOP:  # a link to itself is no file
                    raise
        return stats

    def names(self, prefix: str) -> list[str]:
        """Names of all files that start with prefix, temporary ones too."""
        return self._patiently("list", prefix, lambda: list(self._walk(prefix)))

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        rename(self.root / old, self.root / new)

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
            inside = Path(base).relative_to(self.root).as_posix()
            names = files if inside == "." else [f"{inside}/{file}" for file in files]
            yield from (name for name in names if name.startswith(prefix))


def _raise_unless_gone(err: OSError) -> None:
    if not isinstance(err, FileNotFoundError):
        raise err


def _stat_of(status: os.stat_result) -> ObjectStat:
    return ObjectStat(size=status.st_size, identity=f"{status.st_mtime_ns}-{status.st_ino}")
