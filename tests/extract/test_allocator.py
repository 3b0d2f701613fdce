"""Freed memory stays: counted in page faults of a process that takes and frees the same blocks again and again."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
from concurrent.futures import ThreadPoolExecutor
from dtpipe.extract.allocator import keep_freed_memory

how, where, size_mib = sys.argv[1], sys.argv[2], int(sys.argv[3])
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def work(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        blocks = [library.malloc(size_mib << 20) for _ in range(4)]
        for block in blocks:
            ctypes.memset(block, 1, size_mib << 20)
        for block in blocks:
            library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with ThreadPoolExecutor(1) as pool:
    if where == "earlier thread":
        pool.submit(work, 1).result()
    kept = keep_freed_memory() if how == "keep" else None
    print(kept, work(8) if where == "main" else pool.submit(work, 8).result())
"""


def ran(how: str, where: str = "main", size_mib: int = 16, **variables: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", CODE, how, where, str(size_mib)]
    kept, faults = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.parametrize(("where", "size_mib"), [("main", 20), ("thread", 80), ("thread", 20), ("earlier thread", 20)])
def test_blocks_that_were_freed_are_used_again(where: str, size_mib: int) -> None:
    _, without = ran("leave", where, size_mib)
    kept, with_it = ran("keep", where, size_mib)
    assert kept == "True"
    assert with_it * 6 < without


def test_an_environment_that_sets_malloc_up_is_left_alone() -> None:
    assert ran("keep", MALLOC_ARENA_MAX="2")[0] == "False"
