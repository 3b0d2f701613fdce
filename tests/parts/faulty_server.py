"""An HTTP server in front of another that misbehaves as it is told: what object stores do on a bad day.

It hands requests on byte for byte to `behind` (moto), or serves a folder as web servers do, unless a fault matches.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit


@dataclass
class Fault:
    """What happens to the next `times` requests of a method (any, if empty) whose path holds `path`."""

    act: Callable[[Any], None]
    """Does the fault; takes the request's handler."""
    method: str = ""
    path: str = ""
    times: int = 10**9


def status(number: int, code: str = "", message: str = "", **headers: str) -> Callable[[Any], None]:
    """Answer with a status and, except to HEAD, S3's XML of an error."""

    def act(handler: Any) -> None:
        handler.read_body()
        body = b""
        if code and handler.command != "HEAD":
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        handler.answer(number, {"content-type": "application/xml", **headers}, body)

    return act


def hang(handler: Any) -> None:
    """Read the request and never answer."""
    handler.read_body()
    handler.server.stopped.wait(60)
    handler.drop()


def reset_midway(handler: Any) -> None:
    """Take a little of the body, then reset the connection."""
    if handler.headers.get("Expect") or handler.headers.get("Content-Length"):
        handler.rfile.read(min(1000, int(handler.headers.get("Content-Length") or 0) // 2))
    handler.drop()


def lose_answer(handler: Any) -> None:
    """Hand the request on, then reset the connection in place of the answer."""
    handler.server.ask(handler)
    handler.drop()


def trickle(handler: Any) -> None:
    """Answer one byte at a time, for ever."""
    handler.read_body()
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.stopped.wait(0.02):
        handler.wfile.write(b"x")


def cut_answer(handler: Any) -> None:
    """Send the answer's headers and half of its body, then reset."""
    number, headers, body = handler.server.ask(handler)
    handler.answer(number, headers, body, cut=len(body) // 2)
    handler.drop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        fault = self.server.fault_for(self)  # type: ignore[attr-defined]
        try:
            if fault is None:
                number, headers, body = self.server.ask(self)  # type: ignore[attr-defined]
                self.answer(number, headers, body)
            else:
                fault.act(self)
        except OSError:  # the client went away
            self.close_connection = True

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def answer(self, number: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response_only(number)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])

    def drop(self) -> None:
        """End the connection with a reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@dataclass
class FaultyServer:
    """`url` is where it listens; requests are kept as `METHOD path` in `seen`."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def count(self, method: str, path: str = "") -> int:
        """Requests so far of a method whose path holds `path`."""
        return sum(line.startswith(method) and path in line for line in self.seen)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: str | Path, faulty: FaultyServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = behind if isinstance(behind, Path) else None
        self.behind, self.faulty = urlsplit(str(behind)), faulty
        self.stopped = threading.Event()
        self._choosing = threading.Lock()

    def handle_error(self, *_arguments: Any) -> None:
        """Say nothing of clients that went away."""

    def fault_for(self, handler: Any) -> Fault | None:
        with self._choosing:
            self.faulty.seen.append(f"{handler.command} {handler.path}")
            for fault in self.faulty.faults:
                if fault.times > 0 and fault.method in ("", handler.command) and fault.path in handler.path:
                    fault.times -= 1
                    return fault
        return None

    def ask(self, handler: Any) -> tuple[int, dict[str, str], bytes]:
        """The answer of the server behind."""
        body = handler.read_body()
        if self.folder is not None:
            return _file_of(
                self.folder / unquote(handler.path.partition("?")[0]).lstrip("/"), handler.headers.get("Range", "")
            )
        headers = {
            name: value
            for name, value in handler.headers.items()
            if name.lower() not in ("transfer-encoding", "content-length", "expect", "connection")
        }
        connection = http.client.HTTPConnection(self.behind.hostname or "", self.behind.port, timeout=30)
        try:
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            kept = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("transfer-encoding", "connection")
            }
            return answer.status, kept, answer.read()
        finally:
            connection.close()


def _file_of(path: Path, wanted: str) -> tuple[int, dict[str, str], bytes]:
    """A file or a part of it, or a folder's index."""
    if path.is_dir():
        links = "".join(f'<a href="{quote(item.name)}{"/" * item.is_dir()}">x</a>' for item in sorted(path.iterdir()))
        return 200, {"Content-Type": "text/html"}, links.encode()
    if not path.is_file():
        return 404, {}, b""
    data = path.read_bytes()
    if not wanted:
        return 200, {"Content-Type": "application/octet-stream"}, data
    start, _, end = wanted.removeprefix("bytes=").partition("-")
    last = min(int(end or len(data)), len(data) - 1)
    return 206, {"Content-Range": f"bytes {start}-{last}/{len(data)}"}, data[int(start) : last + 1]


def whole_answers(handler: Any) -> None:
    """Answer as servers that know no ranges do."""
    del handler.headers["Range"]
    handler.answer(*handler.server.ask(handler))


@contextmanager
def faulty_server(behind: str | Path) -> Iterator[FaultyServer]:
    """A server on 127.0.0.1 in front of the one at `behind`, or of a folder, until the block ends."""
    faulty = FaultyServer()
    server = _Server(behind, faulty)
    faulty.url = "http://{}:{}".format(*server.server_address)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        server.stopped.set()
        time.sleep(0)
        server.shutdown()
        server.server_close()
        thread.join()
