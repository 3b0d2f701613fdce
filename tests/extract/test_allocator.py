"""Freed memory stays: counted in page faults of a process that takes and frees the same block again and again."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
from dtpipe.extract.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = library.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    library.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def ran(how: str, **variables: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", CODE, how]
    kept, faults = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_block_that_was_freed_is_used_again() -> None:
    _, without = ran("leave")
    kept, with_it = ran("keep")
    assert kept == "True"
    assert with_it * 5 < without


def test_an_environment_that_sets_malloc_up_is_left_alone() -> None:
    assert ran("keep", MALLOC_ARENA_MAX="2")[0] == "False"
