"""Objects of a dataset in any fsspec store: S3, GCS, memory.

One rule: listings are never cached, and put-if-absent is the store's own (`mode="create"`), never a look before a
write.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
from typing import Any

from dtpipe.manifests.pieces import Pieces
from dtpipe.manifests.store.client import Client, Run
from dtpipe.manifests.store.local import ObjectStat
from dtpipe.manifests.store.patience import Patience
from dtpipe.manifests.store.reasons import reason_of

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
_BEYOND = ("InvalidRange", "416")  # a range of an empty object, or past the end
_CREATE_ROUNDS = 2  # a name that is taken and then is not there, as a lock may be, is tried again

_REFUSED = "put-if-absent is refused as if the object were there (412), and nothing is"


class RemoteFiles:
    """Objects under a URL. Methods raise OSError or the client library's errors; `Store` turns them into ours."""

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        self._client = Client(url, patience)  # an unknown protocol or a missing package shows here

    def _path(self, name: str) -> str:
        return f"{self._client.path}/{name}"

    def read(self, name: str) -> bytes:
        """The whole object."""
        path = self._path(name)

        def attempt(run: Run) -> bytes:
            try:
                return bytes(run("cat_file", path, start=0))  # without a start, s3fs asks for the size first
            except Exception as err:
                if reason_of(err).code in _BEYOND and self.stat(name).size == 0:
                    return b""
                raise

        return self._client.patiently("read", path, attempt, ask_size=lambda: self.stat(name).size)

    def read_ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """Each (name, offset, size), requested together; shorter where the object ends."""
        paths = [self._path(name) for name, _, _ in ranges]
        parts: dict[int, bytes] = {}

        def attempt(run: Run) -> None:
            left = [idx for idx in range(len(ranges)) if idx not in parts]
            starts = [ranges[idx][1] for idx in left]
            ends = [ranges[idx][1] + ranges[idx][2] for idx in left]
            answers = run("cat_ranges", [paths[idx] for idx in left], starts, ends, on_error="return")
            failures = {}
            for idx, answer in zip(left, answers, strict=True):
                if isinstance(answer, BaseException):
                    failures[idx] = answer
                else:
                    parts[idx] = bytes(answer)
            for idx, failure in failures.items():
                if isinstance(failure, FileNotFoundError) or reason_of(failure).passes or self._reaches(*ranges[idx]):
                    raise failure
                parts[idx] = b""  # S3 answers a range past the end with an error

        size_bytes = sum(size for _, _, size in ranges)
        self._client.patiently("read", paths[0], attempt, size_bytes)
        return [parts[idx] for idx in range(len(ranges))]

    def write(self, name: str, data: bytes | Pieces) -> ObjectStat:
        """Write or replace an object whole, from memory: large ones in several parts at once, where the store can."""
        data = data if isinstance(data, bytes) else b"".join(data)
        answer = self._client.ask("write", self._path(name), "pipe_file", data, size_bytes=len(data))
        etag = answer.get("ETag") if isinstance(answer, dict) else None  # of this write; uploads in parts give none
        return ObjectStat(len(data), etag.strip('"')) if etag else self.stat(name)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists; True if this call made it, even if the answer that says so was lost.

        After a lost answer, the request that is made again (by us, or by aiohttp on a connection that was kept) finds
        its own object. So what is there is compared; no two writers write the same content.
        """
        for _ in range(_CREATE_ROUNDS):
            if self._create(name, data):
                return True
            with contextlib.suppress(FileNotFoundError):
                return self.read(name) == data
        raise OSError(errno.ENOTSUP, _REFUSED)

    def _create(self, name: str, data: bytes) -> bool:
        try:
            self._client.ask("create", self._path(name), "pipe_file", data, mode="create", size_bytes=len(data))
        except Exception as err:
            if isinstance(err, FileExistsError) or reason_of(err).code in ("PreconditionFailed", "412"):
                return False
            raise
        return True

    def stat(self, name: str) -> ObjectStat:
        """Size and identity of one object."""
        info = self._client.ask("look at", self._path(name), "info")
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
        size_bytes = self.stat(old).size
        self._client.ask("copy", self._path(old), "cp_file", self._path(new), size_bytes=size_bytes)
        self._client.ask("delete", self._path(old), "rm_file")

    def delete(self, name: str) -> None:
        """Remove an object; one that is gone is fine."""
        try:
            self._client.ask("delete", self._path(name), "rm_file")
        except FileNotFoundError:
            return

    def _find(self, prefix: str) -> dict[str, dict[str, Any]]:
        root = self._path("")
        folder = self._path(prefix.rpartition("/")[0]).rstrip("/")
        infos = self._client.find(folder).items()
        objects = {path.removeprefix(root): info for path, info in infos if info["type"] == "file"}
        return {name: info for name, info in objects.items() if name.startswith(prefix) and not name.endswith("/")}

    def _reaches(self, name: str, offset: int, size: int) -> bool:
        """True if the object is so long."""
        return self.stat(name).size >= offset + size


def _stat_of(info: dict[str, Any]) -> ObjectStat:
    for field in _IDENTITY_FIELDS:
        if value := info.get(field):
            stamp = value.timestamp() if isinstance(value, datetime.datetime) else value
            return ObjectStat(size=int(info["size"]), identity=str(stamp).strip('"'))
    raise OSError(
        f"the store gives neither an etag nor a time for {info['name']}, so a late writer could not be noticed"
    )
