"""Reading what others wrote, such as images and teachers, from any fsspec file system, patiently.

`PatientFiles` offers what its users need of a file system, under fsspec's names; files that it opens ask for ranges.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

from dtpipe.manifests.store.client import Client
from dtpipe.manifests.store.patience import Patience
from dtpipe.manifests.store.reasons import NO_STORE, reason_of

_BLOCK_BYTES = 1 << 20  # of an open file that are fetched at once
_FORBIDDEN = ("401", "403")
_NO_RANGES = (
    "the server gives no parts of files (HTTP ranges), which archives need: download it and give the local path"
)


class PatientFiles:
    """The file system of a URL. Methods raise OSError or the client library's errors, after the client's patience."""

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """Raises: ConfigError for an unknown protocol, MissingPackageError for its package."""
        self._client = Client(url, patience)
        self.path = self._client.path

    def isdir(self, path: str) -> bool:
        """True for a folder; a store's prefix counts."""
        return bool(self._client.ask("look at", path, "isdir"))

    def isfile(self, path: str) -> bool:
        """True for a file. Where fsspec takes whatever goes wrong for `no`, this raises it."""
        try:
            return bool(self.info(path)["type"] == "file")
        except FileNotFoundError as err:
            reason = reason_of(err)
            if reason.passes or reason.code in _FORBIDDEN or reason.code in NO_STORE:
                raise
            return False

    def info(self, path: str) -> dict[str, Any]:
        """Size in bytes (None where the server does not say), type, and what the store says else."""
        return cast(dict[str, Any], self._client.ask("look at", path, "info"))

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """Path to info of all files below a folder."""
        return self._client.find(path)

    def ls(self, path: str, detail: bool = True) -> Any:
        """What lies right in a folder."""
        return self._client.ask("list", path, "ls", detail=detail)

    def glob(self, path: str) -> list[str]:
        """Paths that match a pattern."""
        return self._client.glob(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a file, or from `start` to `end` (exclusive), fewer where it ends."""
        if start is None or end is None:
            size = lambda: int(self.info(path)["size"] or 0)  # noqa: E731
            return bytes(self._client.patiently("read", path, lambda run: run("cat_file", path), ask_size=size))
        data = bytes(self._client.ask("read", path, "cat_file", start=start, end=end, size_bytes=end - start))
        if len(data) > end - start:
            raise OSError(_NO_RANGES)
        return data

    def get_file(self, path: str, to: str, size_bytes: int) -> None:
        """Copy a file of known size to a local path."""
        self._client.ask("read", path, "get_file", to, size_bytes=size_bytes)

    def open(self, path: str) -> BinaryIO:
        """A file that can be sought and keeps no connection. Raises: OSError also for a server without ranges."""
        size = self.info(path)["size"]
        if size is None or self._client.lacks_ranges(path):
            raise OSError(_NO_RANGES)
        return cast(BinaryIO, io.BufferedReader(_RangeFile(self, path, int(size)), _BLOCK_BYTES))

    def unstrip_protocol(self, path: str) -> str:
        """A path as a URL."""
        return str(self._client.fs.unstrip_protocol(path))

    def strip_protocol(self, uri: str) -> str:
        """The inverse of `unstrip_protocol`."""
        return str(self._client.fs._strip_protocol(uri))


class _RangeFile(io.RawIOBase):
    def __init__(self, files: PatientFiles, path: str, size: int) -> None:
        self._files, self._path, self._size, self._at = files, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise ValueError(f"negative position {self._at}")
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._files.cat_file(self._path, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
