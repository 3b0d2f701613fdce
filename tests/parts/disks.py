"""A file system so small that it can be filled, mounted in memory where the tests may mount one."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BLOCK = 4096


@contextmanager
def small_disk(place: Path, size_bytes: int) -> Iterator[Path]:
    """An empty disk of so many bytes at `place`; skips the test where nothing may be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk needs `mount`, which is not here")
    if done.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Write a file that takes all room but a little; remove it to make room again."""
    path = disk / "filling"
    room = shutil.disk_usage(disk).free - leave_bytes
    with path.open("wb", buffering=0) as file:
        try:
            for _ in range(room // BLOCK):
                file.write(bytes(BLOCK))
        except OSError as err:
            assert err.errno == errno.ENOSPC
    return path


def files_on(disk: Path) -> set[str]:
    """All files by their path below the disk, but for what fills it."""
    return {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()} - {"filling"}
