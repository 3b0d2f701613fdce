"""The cache of remote objects by itself: within its bytes, from many threads and processes."""

from __future__ import annotations

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


def test_what_was_used_least_lately_makes_room(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, 25)
    contents = [bytes([number]) * 10 for number in range(3)]
    digests = [blake3(content).hexdigest() for content in contents]

    def use(number: int) -> None:
        assert cache.open(digests[number], 10, lambda ranges: [contents[number][:size] for _, size in ranges])

    for moment, number in enumerate((0, 1, 0)):
        use(number)
        os.utime(tmp_path / digests[number], (moment, moment))
    use(2)
    assert kept(tmp_path).keys() == {digests[0], digests[2]}


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
        file = cache.open(
            blake3(content).hexdigest(),
            1000,
            lambda ranges: [content[start : start + size] for start, size in ranges],
        )
        return file is None or file.read(0, 2000) == content

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
