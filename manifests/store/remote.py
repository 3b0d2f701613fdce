"""Objects of a dataset in any fsspec store: S3, GCS, memory.

One rule: listings are never cached, and put-if-absent is the store's own (`mode="create"`), never a look before a
write.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import fsspec

from dtpipe.manifests.errors import ConfigError, MissingPackageError
from dtpipe.manifests.store.local import ObjectStat

_IDENTITY_FIELDS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "mtime",
    "created",
    "LastModified",
    "last_modified",
    "updated",
)
_CREATE_ATTEMPTS = 5
_TRY_AGAIN = ("ConditionalRequestConflict", "OperationAborted", "409")


class RemoteFiles:
    """Objects under a URL. Methods raise OSError or the client library's errors; `Store` turns them into ours."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: tuple[int, Any, str] | None = None
        _ = self._fs  # an unknown protocol or a missing package shows here

    @property
    def _fs(self) -> Any:
        """The file system of this process; clients do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_open(self.url))
        return self._opened[1]

    def _path(self, name: str) -> str:
        _ = self._fs
        assert self._opened is not None
        return f"{self._opened[2]}/{name}"

    def read(self, name: str) -> bytes:
        """The whole object."""
        return bytes(self._fs.cat_file(self._path(name)))

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """Each (name, offset, size), requested together; shorter where the object ends."""
        paths = [self._path(name) for name, _, _ in ranges]
        starts = [offset for _, offset, _ in ranges]
        ends = [offset + size for _, offset, size in ranges]
        parts = self._fs.cat_ranges(paths, starts, ends, on_error="return")
        return [self._range_or_raise(part, *place) for part, place in zip(parts, ranges, strict=True)]

    def write(self, name: str, data: bytes) -> ObjectStat:
        """Write or replace an object whole."""
        answer = self._fs.pipe_file(self._path(name), data)
        etag = answer.get("ETag") if isinstance(answer, dict) else None  # of this write; uploads in parts give none
        return ObjectStat(len(data), etag.strip('"')) if etag else self.stat(name)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists; True if this call made it, as far as the client knows."""
        for attempt in range(1, _CREATE_ATTEMPTS + 1):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
                return True
            except FileExistsError:
                return False
            except OSError as err:
                if _code(err) in ("PreconditionFailed", "412"):
                    return False
                if _code(err) not in _TRY_AGAIN or attempt == _CREATE_ATTEMPTS:
                    raise
                time.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    def stat(self, name: str) -> ObjectStat:
        """Size and identity of one object."""
        info = self._fs.info(self._path(name))
        if info["type"] != "file":
            raise FileNotFoundError(name)
        return _stat_of(info)

    def stats(self, prefix: str) -> dict[str, ObjectStat]:
        """All objects whose name starts with prefix, in few requests."""
        return {name: _stat_of(info) for name, info in self._find(prefix).items()}

    def names(self, prefix: str) -> list[str]:
        """Names of all objects that start with prefix."""
        return list(self._find(prefix))

    def rename(self, old: str, new: str) -> None:
        """Copy, then delete: a kill in between leaves both."""
        self._fs.cp_file(self._path(old), self._path(new))
        self._fs.rm_file(self._path(old))

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone is fine."""
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def _find(self, prefix: str) -> dict[str, dict[str, Any]]:
        root = self._path("")
        folder = self._path(prefix.rpartition("/")[0]).rstrip("/")
        infos = self._fs.find(folder, detail=True).items()
        objects = {path.removeprefix(root): info for path, info in infos if info["type"] == "file"}
        return {name: info for name, info in objects.items() if name.startswith(prefix) and not name.endswith("/")}

    def _range_or_raise(self, part: bytes | BaseException, name: str, offset: int, size: int) -> bytes:
        if isinstance(part, FileNotFoundError):
            raise part
        if isinstance(part, BaseException):
            if self.stat(name).size < offset + size:  # S3 answers a range past the end with an error
                return b""
            raise part
        return bytes(part)


def _open(url: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as err:
        protocol = url.partition("://")[0]
        raise MissingPackageError(
            f"{url}: {err}; run `pip install 'dtpipe[{protocol}]'` or install that package"
        ) from err
    except ValueError as err:
        raise ConfigError(f"{url}: {err}; use a path or a URL that fsspec knows, such as s3://bucket/folder") from err
    return fs, path.rstrip("/")


def _code(err: BaseException) -> str:
    """The store's own error code, where the client kept it."""
    response = getattr(err.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _stat_of(info: dict[str, Any]) -> ObjectStat:
    for field in _IDENTITY_FIELDS:
        if value := info.get(field):
            stamp = value.timestamp() if isinstance(value, datetime.datetime) else value
            return ObjectStat(size=int(info["size"]), identity=str(stamp).strip('"'))
    raise OSError(
        f"the store gives neither an etag nor a time for {info['name']}, so a late writer could not be noticed"
    )
