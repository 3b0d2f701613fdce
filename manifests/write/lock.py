"""One writer per dataset: epochs claimed by put-if-absent, a heartbeat, and takeover of what is dead.

`lock/00007.json` is the claim of epoch 7 and belongs to one process, which rewrites it as its heartbeat; the highest
epoch is the writer. A claim is a put-if-absent, so two takers of one stale lock cannot both win. One rule: clocks of
different machines are never compared. A taker elsewhere watches for the heartbeat to change; on the same machine the
kernel's clock and process table answer at once.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
from pydantic import Field

from dtpipe.manifests.canonical import dump_record, load_record
from dtpipe.manifests.errors import LockHeldError, ManifestError, MissingObjectError, StoreError
from dtpipe.manifests.schema import StrictModel
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.store import LOCK_FOLDER, Store

_MISSED_BEATS = 3  # a holder is dead only after so many of its own intervals


class Process(StrictModel):
    """Which process holds a lock, so that another on the same machine can see whether it lives."""

    host: str = Field(description="Host name, for people.")
    boot: str = Field(
        description="Identity of the machine's boot; and clock namespace; all its processes share one uptime."
    )
    pid_space: str = Field(description="Identity of the pid namespace: equal pids mean equal processes only inside it.")
    pid: int
    started_s: float = Field(description="Start of the process, which tells a reused pid apart.")


class LockRecord(StrictModel):
    """lock/00007.json."""

    epoch: int = Field(ge=1)
    holder: Process
    owner: str = Field(description="Random name of this claim.")
    beat: int = Field(ge=0, description="Heartbeats so far; a taker watches it change.")
    uptime_s: float = Field(description="Clock of the holder's boot at the last heartbeat.")
    heartbeat: str = Field(description="Wall clock of the last heartbeat, for people only.")
    interval_s: float = Field(gt=0, description="Seconds between heartbeats.")
    released: bool = False


def check_epoch(store: Store, epoch: int) -> None:
    """See that `epoch` is still the highest, before something is published in its name.

    Raises: LockHeldError when another writer took over, or the lock is gone.
    """
    highest = max(_epochs(store), default=0)
    if highest > epoch:
        record = _read(store, highest)[1]
        who = _describe(record) if record else "another process"
        raise LockHeldError(
            f"{store.url}: taken over by {who} (epoch {highest}, this writer had {epoch}); "
            "this writer stops, the other goes on"
        )
    if highest < epoch:
        raise LockHeldError(
            f"{store.where(lock_name(epoch))} is gone: somebody removed the lock of this writer; run the command again"
        )


def lock_name(epoch: int) -> str:
    """Object name of an epoch's claim."""
    return f"{LOCK_FOLDER}{epoch:05d}.json"


class Lock:
    """The right of one process to write a dataset; a context manager that releases it.

    Held as long as no other process claims a higher epoch, which one does only when this one looks dead. `check` before
    each publish tells. A process that wakes up late still writes nothing that the merge would not notice.
    """

    def __init__(self, store: Store, record: LockRecord) -> None:
        self.store = store
        self._record = record
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dtpipe-lock", daemon=True)

    @classmethod
    def acquire(
        cls,
        store: Store,
        stale_s: float = 120.0,
        on_wait: Callable[[str], None] | None = None,
        process: Process | None = None,
    ) -> Lock:
        """Claim the next epoch if no live writer holds the dataset; watches only a silent one elsewhere, for `stale_s`.

        The store is probed first, and half-written files of dead local writers are removed.
        Raises: LockHeldError when another writer lives; StoreError when the store cannot carry a lock.
        """
        store.probe()
        held = max(_epochs(store), default=0)
        if held:
            _wait_until_dead(store, held, stale_s, on_wait)
        record = LockRecord(
            epoch=held + 1,
            holder=process or this_process(),
            owner=secrets.token_hex(16),
            beat=0,
            uptime_s=_uptime_s(),
            heartbeat=_now(),
            interval_s=min(10.0, stale_s / 6),
        )
        lock = cls(store, record)
        lock._claim()
        fault_point("lock.acquired")
        lock._thread.start()
        for epoch in _epochs(store):
            if epoch < lock.epoch:
                store.delete(lock_name(epoch))
        store.sweep()
        return lock

    @property
    def epoch(self) -> int:
        """Number of this claim; higher than that of every earlier writer."""
        return self._record.epoch

    def check(self) -> None:
        """Raise LockHeldError if another writer took over. Call before each publish."""
        check_epoch(self.store, self.epoch)

    def release(self) -> None:
        """Let the next writer start at once. Does nothing in a forked child, twice, or after a takeover."""
        if self._record.holder.pid != os.getpid() or self._record.released:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(LockHeldError):
            self.check()
            self._publish(released=True)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except StoreError:
            if err is None:
                raise

    def _claim(self) -> None:
        name, data = lock_name(self.epoch), dump_record(self._record)
        try:
            ours = self.store.create(name, data) or self.store.read(name) == data  # False to a repeated request
        except MissingObjectError:
            ours = False
        if not ours or max(_epochs(self.store), default=0) != self.epoch:
            if ours:
                self.store.delete(name)
            raise _lost_race(self.store)

    def _beat(self) -> None:
        while not self._stop.wait(self._record.interval_s):
            try:
                self.check()
                self._publish()
            except LockHeldError:
                return  # `check` tells the writer
            except StoreError:
                continue  # a store out of reach for a while: the next beat may get through

    def _publish(self, released: bool = False) -> None:
        with self._writing:
            changes = {
                "beat": self._record.beat + 1,
                "uptime_s": _uptime_s(),
                "heartbeat": _now(),
                "released": released,
            }
            self._record = self._record.model_copy(update=changes)
            self.store.write(lock_name(self.epoch), dump_record(self._record))


def this_process() -> Process:
    """The identity of the calling process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    clock, space = Path("/proc/self/ns/time"), Path("/proc/self/ns/pid")
    booted = boot.read_text().strip() if boot.exists() else f"{platform.node()}/{psutil.boot_time():.0f}"
    return Process(
        host=platform.node(),
        boot=f"{booted}/{clock.readlink()}" if clock.is_symlink() else booted,
        pid_space=str(space.readlink()) if space.is_symlink() else "",
        pid=os.getpid(),
        started_s=psutil.Process().create_time(),
    )


def holder_is_dead(record: LockRecord, stale_s: float) -> bool | None:
    """Whether a lock's holder is dead, as far as this machine knows; None when it runs elsewhere: watch it."""
    here, holder = this_process(), record.holder
    if record.released:
        return True
    if holder.boot != here.boot:
        return None
    if holder.pid_space == here.pid_space and not _is_running(holder):
        return True
    return _uptime_s() - record.uptime_s > _patience_s(record, stale_s)


def _wait_until_dead(store: Store, epoch: int, stale_s: float, on_wait: Callable[[str], None] | None) -> None:
    """Return when the holder of `epoch` may be replaced.

    A claim that cannot be read is watched like one from another machine: a living holder rewrites it.
    """
    data, record = _read(store, epoch)
    if data is None:
        raise _lost_race(store)
    dead = holder_is_dead(record, stale_s) if record else None
    if dead:
        return
    who = _describe(record) if record else "a process whose lock file is damaged"
    held = LockHeldError(
        f"{store.url} is being written by {who} (epoch {epoch}); wait for it, or stop it and run again"
    )
    if dead is False:
        raise held
    patience_s = _patience_s(record, stale_s)
    if on_wait:
        on_wait(f"{store.url} is locked by {who}; watching up to {patience_s:.0f} s for a sign of life")
    if not _stays_silent(store, epoch, data, patience_s):
        raise held


def _stays_silent(store: Store, epoch: int, seen: bytes, patience_s: float) -> bool:
    """True if a claim does not change for so long, by this process's own clock, or was released meanwhile."""
    deadline = time.monotonic() + patience_s
    while (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(left_s, max(0.02, min(2.0, patience_s / 20))))
        data, record = _read(store, epoch)
        if data != seen:
            return record is not None and record.released
    return max(_epochs(store), default=0) == epoch


def _patience_s(record: LockRecord | None, stale_s: float) -> float:
    return max(stale_s, _MISSED_BEATS * record.interval_s) if record else stale_s


def _epochs(store: Store) -> list[int]:
    names = [
        name.removeprefix(LOCK_FOLDER).removesuffix(".json")
        for name in store.list(LOCK_FOLDER)
        if name.endswith(".json")
    ]
    return [int(name) for name in names if name.isdecimal()]


def _read(store: Store, epoch: int) -> tuple[bytes | None, LockRecord | None]:
    """A claim's bytes and record; no bytes when it is gone, no record when it is damaged."""
    name = lock_name(epoch)
    try:
        data = store.read(name)
    except MissingObjectError:
        return None, None
    try:
        record = load_record(LockRecord, data, store.where(name))
    except ManifestError:
        return data, None
    return data, record if record.epoch == epoch else None


def _is_running(holder: Process) -> bool:
    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.started_s) < 2.0  # s; a reused pid started later
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _lost_race(store: Store) -> LockHeldError:
    return LockHeldError(
        f"{store.url}: another process took the lock at the same moment; wait for it to finish and run again"
    )


def _describe(record: LockRecord) -> str:
    return f"process {record.holder.pid} on {record.holder.host} (last heartbeat {record.heartbeat})"


def _uptime_s() -> float:
    return time.monotonic()  # one clock for all processes of a boot; it stands still while the machine sleeps


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
