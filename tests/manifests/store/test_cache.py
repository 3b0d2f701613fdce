"""The cache of remote objects by itself: within its bytes, from many threads and processes."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3

from dtpipe.manifests.store.cache import ObjectCache


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_what_was_used_least_lately_makes_room_unless_it_is_in_use(tmp_path: Path) -> None:
    contents = [bytes([number]) * 10 for number in range(4)]
    digests = [blake3(content).hexdigest() for content in contents]

    def use(cache: ObjectCache, number: int) -> bool:
        return bool(cache.open(digests[number], 10, lambda ranges: [contents[number][:size] for _, size in ranges]))

    def cache_of(*in_use: int) -> ObjectCache:
        cache = ObjectCache(tmp_path, 25)
        cache.claim(digests[number] for number in in_use)
        return cache

    for moment, number in enumerate((0, 1, 0)):
        assert use(cache_of(), number)
        os.utime(tmp_path / digests[number], (moment, moment))
    assert use(cache_of(0, 1, 2), 0) and not use(cache_of(0, 1, 2), 2)
    assert kept(tmp_path).keys() == {digests[0], digests[1]}
    running = cache_of(2, 3)
    assert use(cache_of(0), 0)  # by another process, say
    assert use(running, 2) and not use(running, 3)
    assert kept(tmp_path).keys() == {digests[0], digests[2]}


def test_a_full_cache_is_not_looked_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, contents = ObjectCache(tmp_path, 25), [bytes([number]) * 20 for number in range(2)]
    cache.claim(blake3(content).hexdigest() for content in contents)

    def use(content: bytes) -> bool:
        return bool(cache.open(blake3(content).hexdigest(), 20, lambda ranges: [content]))

    assert use(contents[0]) and not use(contents[1])
    monkeypatch.setattr(Path, "iterdir", lambda path: pytest.fail("looked through"))
    assert use(contents[0]) and not use(contents[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_that_is_forked_in_mid_fetch_does_not_keep_the_lock(tmp_path: Path) -> None:
    cache, context, content = ObjectCache(tmp_path, 25), multiprocessing.get_context("fork"), bytes(10)
    ended = context.Event()
    child = context.Process(target=ended.wait, args=(30,))

    def fetch(ranges: list[tuple[int, int]]) -> list[bytes]:
        child.start()
        return [content]

    digest = blake3(content).hexdigest()
    assert cache.open(digest, 10, fetch)
    with (tmp_path / f"{digest[:2]}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ended.set()
    child.join()


def test_what_takes_its_name_while_another_makes_room_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One object is whole just when another counts what is there; both do not fit with a third."""
    cache, listed = ObjectCache(tmp_path, 2500), Path.iterdir
    begun, counting, ended = (threading.Event() for _ in range(3))

    def use(number: int, before: Callable[[], object] = lambda: None) -> None:
        content = bytes([number]) * 1000

        def fetch(ranges: list[tuple[int, int]]) -> list[bytes]:
            before()
            return [content[:size] for _, size in ranges]

        cache.open(blake3(content).hexdigest(), 1000, fetch)

    def iterdir(folder: Path) -> list[Path]:
        paths = list(listed(folder))
        counting.set()
        ended.wait(0.5)  # the lock keeps the other from ending here
        return paths

    use(0)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(use, 1, lambda: (begun.set(), counting.wait(10)))
        other.add_done_callback(lambda _: ended.set())
        assert begun.wait(10)
        monkeypatch.setattr(Path, "iterdir", iterdir)
        use(2)
        monkeypatch.undo()
        other.result()
    assert sum(map(len, kept(tmp_path).values())) <= 2500


def _use_many(folder: str, most: int, connection: object) -> None:
    cache = ObjectCache(Path(folder), most)
    contents = [bytes([number]) * 1000 for number in range(8)]

    def use(number: int) -> bool:
        content = contents[number % 8]
        digest = blake3(content).hexdigest()
        file = cache.open(digest, 1000, lambda ranges: [content[start : start + size] for start, size in ranges])
        with contextlib.suppress(FileNotFoundError):
            os.utime(cache.folder / digest, (0, 0))  # so that others may drop it
        return file is None or file.read(0, 2000) in (content, b"")  # empty where another made room meanwhile

    with ThreadPoolExecutor(3) as pool:
        connection.send(all(pool.map(use, range(80))))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_many_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(3)]
    children = [context.Process(target=_use_many, args=(str(tmp_path), 3500, sender)) for _, sender in pipes]
    for child in children:
        child.start()
    assert all(receiver.poll(60) and receiver.recv() for receiver, _ in pipes)
    for child in children:
        child.join()
    assert sum(map(len, kept(tmp_path).values())) <= 3500
    assert not any(name.endswith(".tmp") for name in kept(tmp_path))
