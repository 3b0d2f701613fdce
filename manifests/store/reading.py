"""Reading what others wrote, such as images and teachers, from any fsspec file system, patiently.

`PatientFiles` offers what its users need of a file system, under fsspec's names; files that it opens ask for ranges.
"""

from __future__ import annotations

import io
from functools import partial
from http import HTTPStatus
from typing import Any, BinaryIO, cast

from dtpipe.manifests.store.client import Client, Run
from dtpipe.manifests.store.patience import Patience
from dtpipe.manifests.store.reasons import NO_STORE, reason_of

_BLOCK_BYTES = 1 << 20  # of an open file that are fetched at once
_EMPTY = ("InvalidRange", "416")  # an empty object has no range
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
        if _is_web(path):
            attempt = partial(_stream, path=path, size=end - start, start=start)
            return self._client.patiently("read", path, attempt, size_bytes=end - start)
        return bytes(self._client.ask("read", path, "cat_file", start=start, end=end, size_bytes=end - start))

    def first_bytes(self, path: str, size: int) -> bytes:
        """Bytes of a file of unknown size, no more than `size` of them."""
        known = lambda: min(size, int(self.info(path)["size"] or size))  # noqa: E731
        attempt = partial(_stream if _is_web(path) else _range, path=path, size=size)
        try:
            return self._client.patiently("read", path, attempt, ask_size=known)
        except Exception as err:
            if reason_of(err).code in _EMPTY:
                return b""
            raise

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


def _range(run: Run, path: str, size: int) -> bytes:
    return bytes(run("cat_file", path, start=0, end=size))


def _is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _stream(run: Run, path: str, size: int, start: int | None = None) -> bytes:
    """A web server may send all of a file whatever range it is asked for."""
    return bytes(run(_read_stream, path, size, start))


async def _read_stream(fs: Any, path: str, size: int, start: int | None) -> bytes:
    session = await fs.set_session()
    parts: list[bytes] = []
    wanted = {} if start is None else {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    options = {**fs.kwargs, "headers": {**fs.kwargs.get("headers", {}), **wanted}}
    async with session.get(fs.encode_url(path), **options) as answer:
        fs._raise_not_found_for_status(answer, path)
        if start and answer.status != HTTPStatus.PARTIAL_CONTENT:
            raise OSError(_NO_RANGES)
        while size > 0 and (part := await answer.content.read(min(size, _BLOCK_BYTES))):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


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
