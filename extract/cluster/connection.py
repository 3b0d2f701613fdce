"""Joining a Ray cluster, or a local one that is started for the run, and leaving it."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from types import TracebackType
from typing import Any

from dtpipe.extract.cluster.placement import live_nodes
from dtpipe.manifests.errors import IncompleteError
from dtpipe.manifests.stopping import SIGNALS

CONNECT_S = 10.0  # for a cluster's first answer
_HOST_AND_PORT = re.compile(r"^(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)$")
OBJECT_STORE_BYTES = 128 * 1024**2  # of a local Ray; results are small and features never go there


class Connection:
    """A run's place on a cluster: joined when it is first needed, left at the end if it was joined here."""

    def __init__(self, address: str | None) -> None:
        self._address, self._joined = address, False

    def join(self) -> None:
        """Join or start Ray. Raises: IncompleteError when it does not answer."""
        self._joined = connect(self._address) or self._joined

    def has_gpus(self) -> bool:
        """True if any node of the cluster, which is joined for it, has a GPU."""
        self.join()
        return has_gpus()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._joined:
            disconnect()


def ray_module() -> Any:
    """Ray, imported only when it is used; most of its functions have no types."""
    import ray

    return ray


def connect(address: str | None) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, or start a local one; False if this process was connected already.

    Raises: IncompleteError when Ray does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = ray_module()
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    check_answers(address)
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address == "local" else {}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as err:  # Ray raises bare exceptions as well
        what = "Ray does not start here" if address == "local" else f"the Ray cluster at {address} does not answer"
        raise IncompleteError(f"{what} ({first_line(err)}); run again, or work without Ray: --inline") from err
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray sets one of its own, which would end the run at once
            signal.signal(number, handler)
    return True


def check_answers(address: str) -> None:
    """See that something listens at host:port, since Ray itself tries for minutes. Raises: IncompleteError."""
    match = _HOST_AND_PORT.match(address)
    if not match:  # `local`, `auto`: Ray knows
        return
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), CONNECT_S).close()
    except (OSError, OverflowError) as err:
        raise IncompleteError(
            f"the Ray cluster at {address} does not answer ({err}); "
            f"start it with `ray start --head`, or give no address to use this machine alone"
        ) from err


def disconnect() -> None:
    """Leave the cluster, and end it if it was started by `connect`."""
    ray_module().shutdown()


def has_gpus() -> bool:
    """True if any node of the connected cluster has a GPU."""
    return any(node.gpus > 0 for node in live_nodes(ray_module().nodes()))


def first_line(error: Exception) -> str:
    """Ray's messages run over many lines; the first says it."""
    return str(error).strip().split("\n", 1)[0][:200]
