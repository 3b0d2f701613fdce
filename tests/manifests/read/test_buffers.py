"""Memory is used again once nobody holds it, and not before."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dtpipe.manifests.read import buffers
from dtpipe.manifests.read.buffers import Buffers

SHAPE = (3, 500, 1000)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    monkeypatch.setattr(buffers, "_LEAST_BYTES", 1)
    return Buffers()


def test_memory_that_nobody_holds_is_used_again(pool: Buffers) -> None:
    addresses = set()
    for _ in range(5):
        array = pool.empty(SHAPE, np.float16)
        assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == (SHAPE, "f2", True, True)
        addresses.add(array.ctypes.data)
        del array
    assert len(addresses) == 1


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        lambda array: array[1:2, ::2],
        lambda array: array.reshape(-1).view(np.uint8)[5:],
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[2].flatten(),
        memoryview,
    ],
)
def test_who_holds_a_part_of_an_array_never_sees_it_change(pool: Buffers, hold: object) -> None:
    array = pool.empty(SHAPE, np.float16)
    array[...] = 7
    held = hold(array)  # type: ignore[operator]
    before = bytes(np.asarray(held).tobytes())
    del array
    for _ in range(3):
        pool.empty(SHAPE, np.float16)[...] = 0
    assert np.asarray(held).tobytes() == before


def test_idle_memory_has_a_bound(pool: Buffers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_MOST_IDLE_BYTES", 2000)
    held = [pool.empty((1000,), np.uint8) for _ in range(20)]
    held.clear()
    pool.empty((10,), np.uint8)
    assert sum(map(len, pool._idle)) <= 2000
    assert len(pool._back) <= buffers._MOST_BACK


def test_nearly_equal_sizes_share_blocks_and_waste_little() -> None:
    for size in (1, 7, 1000, 12345, 10**6 + 1, 358 * 2**20 + 17):
        rounded = buffers._rounded(size)
        assert size <= rounded <= size * 1.25
        assert buffers._rounded(rounded) == rounded
    assert buffers._rounded(10**7) == buffers._rounded(10**7 - 1000)


def test_threads_never_get_the_same_memory_and_pickles_have_none(pool: Buffers) -> None:
    def use(number: int) -> bool:
        array = pool.empty(SHAPE, np.uint16)
        array[...] = number
        return bool((array == number).all())

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(60)))
    assert not pickle.loads(pickle.dumps(pool))._idle


def test_arrays_of_small_batches_are_used_again_too() -> None:
    pool, addresses = Buffers(), set()
    for _ in range(5):
        first, second = pool.empty((64, 2, 32, 32), np.uint8), pool.empty((64, 4, 16, 16), np.float16)
        addresses |= {first.ctypes.data, second.ctypes.data}
        del first, second
    assert len(addresses) == 2
