"""A file system of fsspec, asked patiently: every operation on it has a deadline and says when it is tried again.

Clients are opened without retries of their own. What cannot be turned off happens within an attempt's time: gcsfs's
retries, and that aiohttp sends a request once more when the server closed a connection that was kept.
File systems without coroutines (sftp, hdfs, memory) keep the time-outs of their own clients.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.config import conf
from fsspec.utils import get_protocol, glob_translate

from dtpipe.manifests.errors import ConfigError, MissingPackageError
from dtpipe.manifests.store.patience import STORE_PATIENCE, Patience, Request, patiently, trouble_of
from dtpipe.manifests.store.reasons import NO_STORE, reason_of

_T = TypeVar("_T")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""What of dtpipe's extras brings a protocol's package."""
Run = Callable[..., Any]
"""`run(method, *arguments, **options)`: one attempt at an operation of the file system, or at a coroutine."""


class Client:
    """The file system of one URL; safe to use from many threads and after a fork."""

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """Raises: ConfigError for an unknown protocol, MissingPackageError for its package."""
        self.url, self.patience = url, patience or STORE_PATIENCE
        self._opened: tuple[int, Any, str] | None = None
        _ = self.fs

    @property
    def fs(self) -> Any:
        """The file system of this process; clients do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_open(self.url, self.patience))
        return self._opened[1]

    @property
    def path(self) -> str:
        """The URL as its file system writes it."""
        _ = self.fs
        assert self._opened is not None
        return self._opened[2]

    def ask(self, verb: str, path: str, method: str, *arguments: Any, size_bytes: int = 0, **options: Any) -> Any:
        """The answer of `fs.method(path, *arguments, **options)`, an operation that may be repeated."""
        return self.patiently(verb, path, lambda run: run(method, path, *arguments, **options), size_bytes)

    def patiently(
        self,
        verb: str,
        path: str,
        attempt: Callable[[Run], _T],
        size_bytes: int = 0,
        ask_size: Callable[[], int] | None = None,
    ) -> _T:
        """As `patience.patiently`, for an attempt that asks this file system."""
        fs, patience = self.fs, self.patience
        full = str(fs.unstrip_protocol(path))
        request = Request(server_of(full), verb, full)

        def within(limit_s: float) -> _T:
            end_s = time.monotonic() + limit_s
            return attempt(lambda method, *a, **o: _run(fs, method, a, o, end_s, request, patience))

        try:
            return patiently(within, request, patience, size_bytes, ask_size)
        except Exception as err:
            self._raise_with_reason(err)
            raise

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """Path to info of all files below a folder, or of one file; empty where there is nothing."""
        fs = self.fs
        if isinstance(fs, AsyncFileSystem) and type(fs)._find is not AsyncFileSystem._find:
            return dict(self.ask("list", path, "find", detail=True))
        return self._walk(path)

    def glob(self, pattern: str) -> list[str]:
        """Paths of all files that match a pattern, sorted."""
        root = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        matches = re.compile(glob_translate(pattern)).match
        num_levels = pattern[len(root) :].count("/")
        files = self.find(root) if "**" in pattern else self._walk(root, num_levels)
        return sorted(path for path in files if matches(path))

    def _walk(self, root: str, num_levels: int | None = None) -> dict[str, dict[str, Any]]:
        """Folder by folder, since fsspec's own walk passes over folders that it cannot list."""
        files: dict[str, dict[str, Any]] = {}
        folders, seen = [(root, 1)], set[str]()
        while folders:
            folder, level = folders.pop()
            seen.add(folder)
            for info in self._list(folder, folder == root):
                path = info["name"].rstrip("/")
                if info["type"] == "directory":
                    below = path not in seen and (num_levels is None or level < num_levels)
                    folders += [(path, level + 1)] * below
                elif path != folder or folder == root:
                    files[info["name"]] = info
        return files

    def _list(self, folder: str, is_root: bool) -> list[dict[str, Any]]:
        try:
            return list(self.ask("list", folder, "ls", detail=True))
        except FileNotFoundError as err:
            if is_root and not reason_of(err).passes and reason_of(err).code not in NO_STORE:
                return []
            raise

    def lacks_ranges(self, path: str) -> bool:
        """True for a web server that answers a request for a part of a file with all of it."""
        return self.path.startswith(("http://", "https://")) and not self.patiently(
            "look at", path, lambda run: run(_gives_ranges, path)
        )

    def _raise_with_reason(self, error: Exception) -> None:
        """S3 answers HEAD without a body; another request is refused with the reason."""
        reason = reason_of(error)
        if reason.passes or not reason.code.isdecimal() or reason.code == "404" or not hasattr(self.fs, "call_s3"):
            return
        bucket = self.path.partition("/")[0]
        try:
            self.fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1, timeout=self.patience.silence_s)
        except Exception as explained:
            if not reason_of(explained).code.isdecimal():
                raise


def _run(fs: Any, method: Any, arguments: Any, options: Any, end_s: float, request: Request, patience: Patience) -> Any:
    if not isinstance(fs, AsyncFileSystem):
        return getattr(fs, method)(*arguments, **options)
    started_s = time.monotonic()
    operation = partial(method, fs) if callable(method) else getattr(fs, f"_{method}")
    future = asyncio.run_coroutine_threadsafe(operation(*arguments, **options), fs.loop)
    try:
        while (left_s := end_s - time.monotonic()) > 0:
            try:
                return future.result(min(left_s, patience.notice_s))
            except TimeoutError:
                if future.done():  # the operation's own
                    raise
            waited_s = time.monotonic() - started_s
            trouble_of(request.store).waits(request, waited_s, end_s - started_s, patience)
        raise TimeoutError(f"no answer within {end_s - started_s:.2g} s")
    finally:
        future.cancel()


async def _gives_ranges(fs: Any, path: str) -> bool:
    session = await fs.set_session()
    async with session.get(fs.encode_url(path), headers={"Range": "bytes=0-0"}, **fs.kwargs) as answer:
        answer.raise_for_status()
        return bool(answer.status == HTTPStatus.PARTIAL_CONTENT)


def _open(url: str, patience: Patience) -> tuple[Any, str]:
    protocol = get_protocol(url)
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **_options(protocol, url, patience))
    except ImportError as err:
        extra = _EXTRAS.get(protocol)
        advice = f"`pip install 'dtpipe[{extra}]'` brings it" if extra else "install that package"
        raise MissingPackageError(f"{url}: {err}; {advice}") from err
    except ValueError as err:
        raise ConfigError(f"{url}: {err}; use a path or a URL that fsspec knows, such as s3://bucket/folder") from err
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs, path.rstrip("/")


def _options(protocol: str, url: str, patience: Patience) -> dict[str, Any]:
    """Time-outs of single requests, and no retries, beside what the user's fsspec configuration says."""
    if "::" in url:
        return {}
    if protocol in ("s3", "s3a"):
        limits = {"connect_timeout": patience.connect_s, "read_timeout": patience.silence_s}
        retries = {"retries": {"total_max_attempts": 1, "mode": "standard"}}
        return {"config_kwargs": {**conf.get(protocol, {}).get("config_kwargs", {}), **limits, **retries}}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s, sock_read=patience.silence_s)
        return {"client_kwargs": {**conf.get(protocol, {}).get("client_kwargs", {}), "timeout": timeout}}
    return {}


def server_of(url: str) -> str:
    """Bucket or server of a URL, which fails or answers as one."""
    protocol, _, rest = url.partition("://")
    return f"{protocol}://{rest.partition('/')[0]}"
