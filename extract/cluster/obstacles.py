"""What keeps Ray from starting here or a cluster from being joined: seen before, or else read from Ray's words.

Ray's own messages are long, and the ones that matter lie deep in them.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from dtpipe.manifests.errors import ConfigError, IncompleteError

CONNECT_S = 10.0  # for a cluster's first answer
_HOST_AND_PORT = re.compile(r"^(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)$")
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # HTTP/2, which Ray's servers speak
_SETTINGS = 4  # type of the frame with which they answer
_SOCKET_BYTES = 107 if sys.platform.startswith("linux") else 103  # of a Unix socket's path
_ALONE = "or work without Ray: --inline"
_TOKEN_FILE = ".ray/auth_token"  # in the home folder


def check_local(environ: Mapping[str, str]) -> None:
    """See that Ray can keep its files and sockets on this machine.

    Raises: ConfigError when its temporary folder is another user's or has too long a path, or its token is not there.
    """
    folder = Path(environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp") / "ray"
    longest = len(os.fsencode(folder / f"session_0000-00-00_00-00-00_000000_{os.getpid()}/sockets/plasma_store"))
    if longest > _SOCKET_BYTES:
        raise ConfigError(
            f"Ray's temporary folder {folder} is {longest - _SOCKET_BYTES} characters too long for the sockets in it; "
            f"set RAY_TMPDIR to a folder with a shorter path, such as /tmp, {_ALONE}"
        )
    place = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        raise ConfigError(
            f"Ray keeps its files in {folder}, and {place} belongs to {_user(place.stat().st_uid)}: this process, of "
            f"{_user(os.geteuid())}, may not write there; set RAY_TMPDIR to another folder with a short path, {_ALONE}"
        )
    token = environ.get("RAY_AUTH_TOKEN_PATH")
    if token and _uses_tokens(environ) and not environ.get("RAY_AUTH_TOKEN") and not _holds_text(Path(token)):
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH names {token}, which cannot be read or is empty; set it to the file with your token, "
            f"or unset it, {_ALONE}"
        )


def local_token(environ: Mapping[str, str]) -> str | None:
    """A token for a Ray of this process alone, where Ray wants one, finds none, and could not keep one at home."""
    if not _uses_tokens(environ) or environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        return None
    try:
        file = Path.home() / _TOKEN_FILE
        if _holds_text(file):
            return None
        file.parent.mkdir(exist_ok=True)
        writable = os.access(file.parent, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # no home at all
        writable = False
    return None if writable else secrets.token_hex(32)


def check_answers(address: str) -> None:
    """See that what listens at host:port may be a Ray cluster, since Ray itself tries for minutes.

    Raises: IncompleteError.
    """
    match = _HOST_AND_PORT.match(address)
    if not match:  # `local`, `auto`: Ray knows
        return
    start = "start it with `ray start --head`, or give no address to use this machine alone"
    try:
        with socket.create_connection((match["host"].strip("[]"), int(match["port"])), CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            connection.sendall(_HELLO)
            answer = connection.recv(9)
    except (OSError, OverflowError) as err:
        raise IncompleteError(f"the Ray cluster at {address} does not answer ({err}); {start}") from err
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise IncompleteError(
            f"what listens at {address} is no Ray cluster; check the address and its port, or {start}"
        )


def refusal(error: BaseException, address: str) -> ConfigError | IncompleteError:
    """What to say where Ray did not start (address `local`) or a cluster was not joined."""
    said = "\n".join(str(one) for one in _causes(error))
    what = "Ray does not start here" if address == "local" else f"the Ray cluster at {address} cannot be joined"
    if "InvalidAuthToken" in said or "no authentication token was found" in said:
        return ConfigError(
            f"{what}: it wants a token that this process does not have; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
            f"the token of who started it (their ~/{_TOKEN_FILE}), or give no address to use this machine alone"
        )
    if path := re.search(r"RAY_AUTH_TOKEN_PATH is set but .*?: (.*?)\. Ensure", said):
        return ConfigError(f"{what}: RAY_AUTH_TOKEN_PATH names {path[1]}, which cannot be read or is empty; correct it")
    if "AF_UNIX path length" in said:
        return ConfigError(f"{what}: its temporary folder has too long a path; set RAY_TMPDIR to a shorter one")
    if mismatch := re.search(r"Version mismatch: (.*)", said, re.DOTALL):
        there_and_here = " ".join(mismatch[1].split())[:200]
        return ConfigError(f"{what}: its versions differ ({there_and_here}); install the same Ray and Python")
    denied = next((one for one in _causes(error) if isinstance(one, PermissionError) and one.filename), None)
    if denied is not None:
        return ConfigError(f"{what}: {denied.filename} may not be written or run; set RAY_TMPDIR or its permissions")
    return IncompleteError(f"{what} ({first_line(error)}); run again, {_ALONE}")


def first_line(error: BaseException) -> str:
    """Ray's messages run over many lines; the first says it."""
    return str(error).strip().split("\n", 1)[0][:200]


def _uses_tokens(environ: Mapping[str, str]) -> bool:
    return environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def _holds_text(file: Path) -> bool:
    try:
        return bool(file.read_text().strip())
    except (OSError, UnicodeDecodeError):
        return False


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
