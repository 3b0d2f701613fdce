"""Named steps at which a test can stop the process, so that crash safety is shown and not assumed.

A step costs one truth test while nothing is armed. Only the command line arms from the environment
(`DTPIPE_FAULT=name[:nth[:kill|stop]]`, handed on to workers).
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Literal

from dtpipe.manifests.errors import ConfigError

FAULT_VARIABLE = "DTPIPE_FAULT"

FAULT_POINTS = (
    "lock.acquired",  # the epoch is ours, nothing else is written yet
    "store.temporary",  # a local temporary file is whole, its name not yet published
    "fit.kept",  # what one level was fitted with is written, the plan is not
    "plan.listing",  # listing.parquet written, plan.json not
    "plan.created",  # plan.json written, zarr metadata not
    "shard.object",  # one object of a shard written
    "shard.objects",  # all objects of a shard written and digested
    "commit.before",  # just before a shard's entry
    "commit.after",  # just after a shard's entry
    "merge.rejected",  # an entry that does not fit its objects was renamed
    "merge.shards",  # shards.parquet written
    "merge.index",  # index.parquet written
    "merge.before_manifest",  # everything but manifest.json is there
    "merge.after",  # manifest.json written, lock not yet released
    "repair.rejected",  # repair renamed one entry
    "repair.manifest",  # repair marked the manifest incomplete
    "repair.after",  # repair is done, lock not yet released
)

Action = Literal["kill", "stop"]
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_armed: dict[str, tuple[int, Action]] = {}
_counting = threading.Lock()


def fault_point(name: str) -> None:
    """Stop the process here when this step is armed and its turn has come."""
    if not _armed:
        return
    assert name in FAULT_POINTS, f"fault point {name} is not listed"
    with _counting:
        if name not in _armed:
            return
        left, action = _armed[name]
        if left > 1:
            _armed[name] = (left - 1, action)
            return
        del _armed[name]
        os.write(2, f"fault point {name}: {action}\n".encode())
        os.kill(os.getpid(), _SIGNALS[action])


def arm(name: str, nth: int = 1, action: Action = "kill") -> None:
    """Make the nth pass of a step SIGKILL this process, or SIGSTOP it (SIGCONT wakes it, as a zombie writer).

    Raises: ConfigError for an unknown step or action, or when nth is below 1.
    """
    if name not in FAULT_POINTS:
        raise ConfigError(f"fault point {name!r} does not exist; choose one of {', '.join(FAULT_POINTS)}")
    if action not in _SIGNALS:
        raise ConfigError(f"fault point {name}: action {action!r} does not exist; choose kill or stop")
    if nth < 1:
        raise ConfigError(f"fault point {name}: count {nth} is below 1; the first pass is 1")
    _armed[name] = (nth, action)


def arm_spec(spec: str) -> None:
    """Arm from text `name[:nth[:kill|stop]]`, as it stands in `DTPIPE_FAULT`; an empty text arms nothing."""
    if not spec:
        return
    name, _, rest = spec.partition(":")
    count, _, action = rest.partition(":")
    if count and not count.isdecimal():
        raise ConfigError(f"{FAULT_VARIABLE}={spec}: {count!r} is not a count; write name[:nth[:kill|stop]]")
    arm(name, int(count or 1), action or "kill")  # type: ignore[arg-type]
