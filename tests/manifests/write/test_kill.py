"""A toy writer in a process of its own, killed or stopped at each step: what is left is finished by the next one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dtpipe.manifests.errors import LockHeldError, StoreError
from dtpipe.manifests.store.store import Store
from parts import toy
from parts.paths import PARTS

WRITER = [sys.executable, "-m", "parts.toy"]
WRITER_STEPS = (
    "lock.acquired", "plan.listing", "plan.created", "shard.object:5", "shard.objects:2", "commit.before:3",
    "commit.after:2", "merge.shards", "merge.index", "merge.before_manifest", "merge.after",
    *(f"store.temporary:{nth}" for nth in (1, 4, 6, 8, 12, 18)),
)  # fmt: skip


def run_writer(url, spec=""):
    return subprocess.run(
        [*WRITER, str(url), spec], cwd=PARTS.parent, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("spec", WRITER_STEPS)
def test_a_kill_at_each_step_costs_at_most_one_shard(tmp_path, unbroken, spec):
    killed = run_writer(tmp_path, spec)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"fault point {spec.partition(':')[0]}: kill" in killed.stderr
    committed = len(list((tmp_path / "commits").glob("*.json"))) if (tmp_path / "commits").exists() else 0
    begun_shards = (
        {path.name[:5] for path in (tmp_path / "data").glob("[0-9]*")} if (tmp_path / "data").exists() else set()
    )
    assert len(begun_shards) - committed <= 1
    manifest, written = toy.extract(tmp_path)
    assert manifest.digest == unbroken[0]
    assert len(written) == 4 - committed
    assert toy.content_of(tmp_path) == unbroken[1]
    assert not [path for path in tmp_path.rglob("*.tmp") if path.parent.name != "lock" and ".probe-" not in path.name]


def test_kills_in_the_merge_that_sends_back(tmp_path, unbroken):
    toy.extract(tmp_path)
    for shard_idx in (1, 3):
        Store(tmp_path).write(f"data/{shard_idx:05d}-0.bin", b"another writer's bytes")
    killed = run_writer(tmp_path, "merge.rejected")
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "commits").glob("*.rejected"))) == 1
    unfinished = run_writer(tmp_path)
    assert (unfinished.returncode, "sent back" in unfinished.stderr) == (5, True)
    assert run_writer(tmp_path).stdout.split()[-1] == unbroken[0]
    assert toy.content_of(tmp_path) == unbroken[1]


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, unbroken):
    rng, kills = random.Random(0), 0
    while (done := run_writer(tmp_path, f"store.temporary:{rng.randint(1, 14)}")).returncode == -signal.SIGKILL:
        kills += 1
        if kills == 6:
            break
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert kills >= 4
    assert toy.extract(tmp_path)[0].digest == unbroken[0]
    assert toy.content_of(tmp_path) == unbroken[1]


def stop_at(url, spec, stale_s=60.0):
    """A writer that has stopped itself at a step."""
    command = [*WRITER, str(url), spec, str(stale_s)]
    process = subprocess.Popen(command, cwd=PARTS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"the writer never stopped at {spec}: {process.communicate()}")


@pytest.mark.parametrize(
    "spec", ["shard.object:3", "shard.objects:2", "commit.before:2", "store.temporary:6", "merge.before_manifest:1"]
)
def test_a_zombie_that_wakes_after_its_successor_finished_changes_nothing(tmp_path, unbroken, spec):
    beats_s = (
        2.0 if spec.startswith("store.") else 0.05
    )  # so rare that the temporary file it stops at is not the lock's own
    zombie = stop_at(tmp_path, f"{spec}:stop", stale_s=6 * beats_s)
    try:
        time.sleep(max(0.5, 4 * beats_s))
        manifest, _ = toy.extract(tmp_path, stale_s=0.1)
        assert manifest.digest == unbroken[0]
    finally:
        os.kill(zombie.pid, signal.SIGCONT)
    _, stderr = zombie.communicate(timeout=60)
    # past its last check a writer may still publish: an equal manifest, or an entry that the merge looks at again
    allowed = {
        "merge.before_manifest:1": 0,
        "store.temporary:6": StoreError.exit_code,
    }  # the latter's temporary file was swept
    assert zombie.returncode == allowed.get(spec, LockHeldError.exit_code), stderr
    again, written = toy.extract(tmp_path)
    assert (again.digest, written) == (unbroken[0], [])
    assert toy.content_of(tmp_path) == unbroken[1]


def test_two_writers_at_once_are_one(tmp_path, unbroken):
    first = stop_at(tmp_path, "shard.object:3:stop")
    second = run_writer(tmp_path)  # the first one's heartbeat is fresh
    os.kill(first.pid, signal.SIGCONT)
    stdout, stderr = first.communicate(timeout=60)
    assert (second.returncode, "LockHeldError" in second.stderr) == (2, True), second.stderr
    assert (first.returncode, stdout.split()[-1]) == (0, unbroken[0]), stderr
