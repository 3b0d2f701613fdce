"""Mounts that fail for a moment, and the loop that waits for them and for stores alike."""

from __future__ import annotations

import errno
import os
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store import publish
from dtpipe.manifests.store.patience import Patience, Request, patiently
from dtpipe.manifests.store.reasons import reason_of
from dtpipe.manifests.store.store import Store

FAST = Patience(
    connect_s=1.0, silence_s=0.5, attempt_s=5.0, total_s=6.0, first_s=6.0, first_pause_s=0.02, longest_pause_s=0.1
)
IMPATIENT = replace(FAST, silence_s=0.15, attempt_s=0.3, total_s=0.8, first_s=0.8)  # for what fails anyway


# --- disks and mounts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_a_mount_that_fails_for_a_moment_is_waited_for(tmp_path, monkeypatch, notices, number):
    store = Store(tmp_path, FAST)
    store.write("a", b"one")
    left = [2]

    def fail_twice(real):
        def call(*arguments, **options):
            if left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(Path, "read_bytes", fail_twice(Path.read_bytes))
    monkeypatch.setattr(os, "pread", fail_twice(os.pread))
    monkeypatch.setattr(os, "fsync", fail_twice(os.fsync))
    for use, expected in (
        (lambda: store.read("a"), b"one"),
        (lambda: store.read_range("a", 1, 2), b"ne"),
        (lambda: store.write("b", b"two").size, 3),
        (lambda: store.create("c", b"three"), True),
    ):
        left[0] = 2
        assert use() == expected
        assert left[0] == 0
    assert len(notices()) == 1  # of 8
    assert os.strerror(number) in notices()[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_by_default_a_mount_is_waited_for_briefly(tmp_path, monkeypatch):
    store, real, left = Store(tmp_path), Path.read_bytes, [1]
    store.write("a", b"one")

    def fail_once(path):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail_once)
    assert store.read("a") == b"one"


def test_a_create_on_a_mount_that_failed_after_the_link_is_our_own(tmp_path, monkeypatch):
    store, failing = Store(tmp_path, FAST), [True]

    def fail_once(folder):
        if failing.pop() if failing else False:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(publish, "_sync_folder", fail_once)
    assert store.create("commits/00001.json", b"ours")
    assert not failing
    assert not store.create("commits/00001.json", b"theirs")


def test_a_mount_that_stays_stale_ends_with_what_to_do(tmp_path, monkeypatch):
    def stale(_path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(StoreError, match=r"Stale file handle \(\d+ attempts failed.*check the mount"):
        Store(tmp_path, IMPATIENT).read("a")


def test_errors_that_do_not_pass_are_not_waited_for(tmp_path, monkeypatch, notices):
    tries = []

    def full(_descriptor):
        tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="free some space"):
        Store(tmp_path, FAST).write("a", b"x")
    assert len(tries) == 1
    assert not notices()


# --- the loop itself -------------------------------------------------------------------------------------------------


def test_who_was_asked_twice_to_stop_waits_no_more():
    with StopRequest() as stop:
        threading.Timer(0.3, lambda: (stop.request(), stop.request())).start()
        started_s = time.monotonic()
        with pytest.raises(ConnectionResetError):
            patiently(_reset, Request("test://hurry", "read", "it"), Patience(first_pause_s=20, longest_pause_s=30))
        assert time.monotonic() - started_s < 15


def _reset(_limit_s: float) -> None:
    raise ConnectionResetError("reset")


def test_large_operations_have_more_time_and_unknown_sizes_are_asked_for():
    limits: list[float] = []

    def attempt(limit_s: float) -> str:
        limits.append(limit_s)
        if len(limits) == 1:
            raise TimeoutError
        return "done"

    patience = Patience(silence_s=1, attempt_s=10, total_s=50, first_s=50, first_pause_s=0.01, slowest_b_s=100)
    assert patiently(attempt, Request("test://a", "write", "it"), patience, size_bytes=1000) == "done"
    assert limits == pytest.approx([20, 20], abs=0.5)
    limits.clear()
    assert patiently(attempt, Request("test://a", "read", "it"), patience, ask_size=lambda: 2000) == "done"
    assert limits == pytest.approx([10, 30], abs=0.5)


def test_certificates_and_plain_errors_are_no_reason_to_wait():
    hidden = FileNotFoundError("http://host/a")
    hidden.__cause__ = ConnectionResetError()
    assert reason_of(hidden).passes  # fsspec's http says `not found` for whatever happened
    wrapped = OSError("cannot connect")
    wrapped.__cause__ = ssl.SSLCertVerificationError("self-signed")
    for error in (wrapped, ValueError("x"), PermissionError("x"), FileNotFoundError("x")):
        assert not reason_of(error).passes
