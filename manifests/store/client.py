"""A file system of fsspec, asked patiently: every operation on it has a deadline and says when it is tried again.

Clients are opened without retries of their own. What cannot be turned off happens within an attempt's time: gcsfs's
retries, and that aiohttp sends a request once more when the server closed a connection that was kept.
File systems without coroutines (sftp, hdfs, memory) keep the time-outs of their own clients.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.config import conf
from fsspec.utils import get_protocol

from dtpipe.manifests.errors import ConfigError, MissingPackageError
from dtpipe.manifests.store.patience import STORE_PATIENCE, Patience, Request, patiently, trouble_of
from dtpipe.manifests.store.reasons import reason_of

_T = TypeVar("_T")
Run = Callable[..., Any]
"""`run(method, *arguments, **options)`: one operation of the file system, within the time of one attempt."""


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
        request = Request(_root_of(full), verb, full)

        def within(limit_s: float) -> _T:
            end_s = time.monotonic() + limit_s
            return attempt(lambda method, *a, **o: _run(fs, method, a, o, end_s, request, patience))

        try:
            return patiently(within, request, patience, size_bytes, ask_size)
        except Exception as err:
            self._raise_with_reason(err)
            raise

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


def _run(fs: Any, method: str, arguments: Any, options: Any, end_s: float, request: Request, patience: Patience) -> Any:
    if not isinstance(fs, AsyncFileSystem):
        return getattr(fs, method)(*arguments, **options)
    started_s = time.monotonic()
    future = asyncio.run_coroutine_threadsafe(getattr(fs, f"_{method}")(*arguments, **options), fs.loop)
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


def _open(url: str, patience: Patience) -> tuple[Any, str]:
    protocol = get_protocol(url)
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **_options(protocol, url, patience))
    except ImportError as err:
        raise MissingPackageError(
            f"{url}: {err}; run `pip install 'dtpipe[{protocol}]'` or install that package"
        ) from err
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


def _root_of(url: str) -> str:
    """Bucket or server of a URL, which fails or answers as one."""
    protocol, _, rest = url.partition("://")
    return f"{protocol}://{rest.partition('/')[0]}"
