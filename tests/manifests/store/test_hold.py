"""One process holds a lock file, and what a killed one leaves of it passes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtpipe.manifests.store.hold import hold

LEAVES_A_CHILD = """
import subprocess, sys
from dtpipe.manifests.store.hold import hold
lock = open(sys.argv[1], "a+")
hold(lock)
subprocess.Popen(["sleep", "1"], pass_fds=[lock.fileno()], start_new_session=True)
print("held", flush=True)
input()
"""


def test_the_lock_of_a_killed_process_passes_with_the_children_it_was_starting(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", LEAVES_A_CHILD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGKILL)
    with path.open("a+") as lock:
        hold(lock)


def test_a_lock_that_is_kept_is_refused(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a+") as first, (tmp_path / ".lock").open("a+") as second:
        hold(first)
        with pytest.raises(BlockingIOError):
            hold(second)
        first.close()
        hold(second)
