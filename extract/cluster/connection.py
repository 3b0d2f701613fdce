"""Joining a Ray cluster, or a local one that is started for the run, and leaving it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dtpipe.extract.cluster.obstacles import check_answers, check_local, local_token, refusal
from dtpipe.extract.cluster.placement import live_nodes
from dtpipe.manifests.errors import StoppedError
from dtpipe.manifests.stopping import SIGNALS
from dtpipe.manifests.words import count_of

_log = logging.getLogger(__name__)
_SHOWN_HOSTS = 4
ENVIRONMENT = "RAY_ADDRESS in your environment"
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


def connect(address: str | None, tell: bool = True) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, or start a local one; False if this process was connected already.

    With `tell`, the log says which cluster was joined. A signal to stop while Ray starts is obeyed at once.
    Raises: IncompleteError when Ray does not answer; ConfigError for what must be set otherwise; StoppedError.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = ray_module()
    if ray.is_initialized():
        return False
    named_by = "the setting `ray_address`" if address else ENVIRONMENT
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {}
    if address == "local":
        check_local(os.environ)
        if token := local_token(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = token
        local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    check_answers(address)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except SystemExit as err:  # Ray's own handler, which ends the process as if nothing had happened
        raise _stopped() from err
    except Exception as err:  # Ray raises bare exceptions as well
        raise refusal(err, address) from err
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray sets one of its own, which would end the run at once
                signal.signal(number, handler)
    if tell and address != "local":
        alone = "; unset it to use this machine alone" if named_by == ENVIRONMENT else ""
        _log.warning("%s%s", joined(address, named_by), alone)
    return True


def joined(address: str, named_by: str) -> str:
    """Whose cluster this process has joined, in a sentence."""
    records = [node for node in ray_module().nodes() if node["Alive"]]
    nodes = live_nodes(records)
    hosts = sorted({node.host for node in nodes})
    shown = ", ".join(hosts[:_SHOWN_HOSTS]) + (", .." if len(hosts) > _SHOWN_HOSTS else "")
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return (
        f"joined the Ray cluster at {address}, which {named_by} names{_started_by(records)}: "
        f"{count_of(len(nodes), 'node')} ({shown}), {cpus:g} CPUs, {gpus:g} GPUs"
    )


def _started_by(records: Sequence[Mapping[str, Any]]) -> str:
    """Who started a cluster that has a node on this machine, by the owner of its sockets; else nothing."""
    for node in records:
        session = Path(node.get("RayletSocketName", "")).parent.parent
        with contextlib.suppress(OSError, KeyError):
            if node.get("NodeManagerHostname") == socket.gethostname():
                return f" and {session.owner()} started ({session})"
    return ""


def _stopped() -> StoppedError:
    error = StoppedError(
        "stopped by SIGTERM while Ray was starting; what was committed is kept, run the same command to go on"
    )
    error.exit_code = 128 + signal.SIGTERM
    return error


def disconnect() -> None:
    """Leave the cluster, and end it if it was started by `connect`."""
    ray_module().shutdown()


def has_gpus() -> bool:
    """True if any node of the connected cluster has a GPU."""
    return any(node.gpus > 0 for node in live_nodes(ray_module().nodes()))
