from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dtpipe.manifests.canonical import dump_record, load_record
from dtpipe.manifests.errors import LockHeldError, StoreError
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.lock import (
    Lock,
    LockRecord,
    check_epoch,
    holder_is_dead,
    lock_name,
    this_process,
)

HOLD = """
import sys, time
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.store.store import Store
lock = Lock.acquire(Store(sys.argv[1]), stale_s=float(sys.argv[2]))
print("held", flush=True)
sys.stdin.readline()
try:
    lock.check()
    print("still mine", flush=True)
except Exception as err:
    print(type(err).__name__, flush=True)
"""
ELSEWHERE = this_process().model_copy(update={"boot": "another machine", "host": "far"})


def hold_elsewhere(url, stale_s=30.0):
    """A process that holds the lock until a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, url, str(stale_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def finish(process):
    output, _ = process.communicate("go on\n", timeout=60)
    return output.strip()


def read_record(store, epoch):
    return load_record(LockRecord, store.read(lock_name(epoch)), "lock")


def silent_record(epoch=1, **changes):
    """A claim whose holder does nothing any more."""
    fields = {
        "epoch": epoch,
        "holder": ELSEWHERE,
        "owner": "x",
        "beat": 3,
        "uptime_s": 1.0,
        "heartbeat": "never",
        "interval_s": 0.05,
    }
    return LockRecord(**{**fields, **changes})


def test_a_live_lock_refuses_and_a_released_one_lets_in(store_url):
    store = Store(store_url)
    with Lock.acquire(store) as lock:
        assert lock.epoch == 1
        lock.check()
        started_s = time.monotonic()
        with pytest.raises(LockHeldError, match=f"process {os.getpid()}"):
            Lock.acquire(store)
        assert time.monotonic() - started_s < 5
    with Lock.acquire(store) as lock:
        assert lock.epoch == 2


def test_another_live_process_on_this_machine_refuses_at_once(tmp_path):
    holder = hold_elsewhere(str(tmp_path))
    try:
        with pytest.raises(LockHeldError, match=f"process {holder.pid}"):
            Lock.acquire(Store(tmp_path), stale_s=0.01)
    finally:
        assert finish(holder) == "still mine"


def test_a_killed_process_is_replaced_at_once(tmp_path):
    holder = hold_elsewhere(str(tmp_path))
    holder.kill()
    holder.communicate()
    started_s = time.monotonic()
    with Lock.acquire(Store(tmp_path), stale_s=600) as lock:
        assert lock.epoch == 2
    assert time.monotonic() - started_s < 5


def test_a_killed_process_nobody_waited_for_is_replaced_at_once(tmp_path):
    holder = hold_elsewhere(str(tmp_path))
    os.kill(holder.pid, signal.SIGKILL)
    time.sleep(0.2)  # it stays in the process table as a zombie until communicate() below
    try:
        with Lock.acquire(Store(tmp_path), stale_s=600) as lock:
            assert lock.epoch == 2
    finally:
        holder.communicate()


def test_a_stopped_process_is_replaced_when_stale_and_notices_when_it_wakes(tmp_path):
    holder = hold_elsewhere(str(tmp_path), stale_s=0.5)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        with pytest.raises(LockHeldError):
            Lock.acquire(Store(tmp_path), stale_s=30)
        time.sleep(0.7)
        with Lock.acquire(Store(tmp_path), stale_s=0.5) as lock:
            os.kill(holder.pid, signal.SIGCONT)
            assert finish(holder) == "LockHeldError"
            lock.check()
    finally:
        os.kill(holder.pid, signal.SIGKILL) if holder.poll() is None else None


def test_a_reused_pid_is_no_holder():
    here = this_process()
    fresh = {"uptime_s": time.monotonic()}
    assert holder_is_dead(silent_record(holder=here, **fresh), stale_s=60) is False
    assert (
        holder_is_dead(
            silent_record(holder=here.model_copy(update={"started_s": here.started_s - 100}), **fresh), stale_s=60
        )
        is True
    )


def test_a_process_in_another_container_of_this_machine_is_judged_by_the_shared_uptime():
    inside = this_process().model_copy(update={"pid_space": "pid:[1]", "pid": 2**22 + 1})
    now_s = time.monotonic()
    assert holder_is_dead(silent_record(holder=inside, uptime_s=now_s), stale_s=60) is False
    assert holder_is_dead(silent_record(holder=inside, uptime_s=now_s - 61), stale_s=60) is True


def test_a_process_on_another_machine_cannot_be_judged_by_its_clock():
    for uptime_s, heartbeat in ((0.0, "1970-01-01T00:00:00+00:00"), (1e12, "2999-01-01T00:00:00+00:00")):
        assert holder_is_dead(silent_record(uptime_s=uptime_s, heartbeat=heartbeat), stale_s=60) is None
    assert holder_is_dead(silent_record(released=True), stale_s=60) is True


def test_a_silent_holder_elsewhere_is_watched_then_replaced(store_url):
    store, told = Store(store_url), []
    store.write(lock_name(4), dump_record(silent_record(4)))
    started_s = time.monotonic()
    with Lock.acquire(store, stale_s=0.6, on_wait=told.append) as lock:
        assert lock.epoch == 5
    assert time.monotonic() - started_s >= 0.6
    assert len(told) == 1
    assert "far" in told[0]


def test_a_beating_holder_elsewhere_refuses_long_before_it_would_be_stale(store_url):
    store = Store(store_url)
    with Lock.acquire(store, stale_s=0.6, process=ELSEWHERE) as lock:  # beats each 0.1 s
        started_s = time.monotonic()
        with pytest.raises(LockHeldError, match="far"):
            Lock.acquire(store, stale_s=20)
        assert time.monotonic() - started_s < 10
        lock.check()


def test_a_slow_beating_holder_is_given_its_own_pace(tmp_path):
    store = Store(tmp_path)
    store.write(lock_name(1), dump_record(silent_record(interval_s=0.3)))
    started_s = time.monotonic()
    Lock.acquire(store, stale_s=0.01).release()
    assert time.monotonic() - started_s >= 0.9


def test_a_holder_that_releases_while_watched_lets_in(tmp_path):
    store = Store(tmp_path)
    store.write(lock_name(1), dump_record(silent_record()))
    timer = threading.Timer(0.3, lambda: store.write(lock_name(1), dump_record(silent_record(released=True))))
    timer.start()
    with Lock.acquire(store, stale_s=30) as lock:
        assert lock.epoch == 2
    timer.join()


def test_a_damaged_lock_is_watched_then_replaced(tmp_path):
    store = Store(tmp_path)
    store.write(lock_name(7), b"\0" * 100)
    with Lock.acquire(store, stale_s=0.3) as lock:
        assert lock.epoch == 8


def test_one_of_many_takers_of_a_stale_lock_wins(tmp_path):
    store, outcomes = Store(tmp_path), []
    store.write(lock_name(3), dump_record(silent_record(3)))
    barrier = threading.Barrier(6)

    def take():
        barrier.wait()
        try:
            outcomes.append(Lock.acquire(store, stale_s=0.5))
        except LockHeldError:
            outcomes.append(None)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [lock for lock in outcomes if lock]
    assert len(outcomes) == 6
    assert [lock.epoch for lock in winners] == [4]
    winners[0].release()


def test_a_replaced_holder_stops_beating_and_does_not_release_the_new_one(tmp_path):
    store = Store(tmp_path)
    old = Lock.acquire(store, stale_s=0.3)
    store.write(lock_name(2), dump_record(silent_record(2)))
    with pytest.raises(LockHeldError, match=r"epoch 2, this writer had 1"):
        old.check()
    time.sleep(0.2)
    assert not old._thread.is_alive()
    old.release()
    assert not read_record(store, 2).released
    assert not read_record(store, 1).released


def test_an_epoch_is_checked_elsewhere(store_url):
    store = Store(store_url)
    with Lock.acquire(store) as lock:
        check_epoch(store, lock.epoch)
        with pytest.raises(LockHeldError):
            check_epoch(store, lock.epoch - 1)
        with pytest.raises(LockHeldError, match="gone"):
            check_epoch(store, lock.epoch + 1)


def test_old_claims_are_removed_and_the_highest_stays(tmp_path):
    store = Store(tmp_path)
    for _ in range(3):
        Lock.acquire(store).release()
    assert store.list() == [lock_name(3)]


def test_the_heart_beats(tmp_path):
    store = Store(tmp_path)
    with Lock.acquire(store, stale_s=0.3):
        first = read_record(store, 1)
        time.sleep(0.4)
        later = read_record(store, 1)
    assert later.beat > first.beat
    assert later.uptime_s > first.uptime_s
    assert read_record(store, 1).released


def test_a_store_out_of_reach_for_a_while_does_not_end_the_heart(tmp_path, monkeypatch):
    store = Store(tmp_path)
    with Lock.acquire(store, stale_s=0.3) as lock:
        with monkeypatch.context() as patch:

            def fail(_name, _data):
                raise StoreError("out of reach")

            patch.setattr(store, "write", fail)
            time.sleep(0.2)
            stuck = read_record(store, 1).beat
        time.sleep(0.3)
        assert read_record(store, 1).beat > stuck
        lock.check()


def test_a_forked_child_does_not_release(tmp_path):
    store = Store(tmp_path)
    lock = Lock.acquire(store)
    lock._record = lock._record.model_copy(
        update={"holder": lock._record.holder.model_copy(update={"pid": os.getpid() + 1})}
    )
    lock.release()
    assert not read_record(store, 1).released
    lock._record = lock._record.model_copy(update={"holder": this_process()})
    lock.release()
    assert read_record(store, 1).released


def test_litter_of_a_killed_writer_is_swept(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".00001.tar.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / "data" / ".notes.tmp").write_bytes(b"somebody else's")
    Lock.acquire(store).release()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".notes.tmp"]


def test_a_read_only_store_cannot_be_locked():
    with pytest.raises(StoreError):
        Lock.acquire(Store("/sys/dtpipe-lock"))
