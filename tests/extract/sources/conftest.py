"""Files in an object store, for tests of sources behind a URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import fsspec
import pytest

Upload = Callable[[Mapping[str, bytes]], str]


@pytest.fixture
def upload() -> Iterator[Upload]:
    """Puts files into fsspec's store in memory; the URL of their folder, which is empty again after the test."""
    fs = fsspec.filesystem("memory")

    def put(files: Mapping[str, bytes]) -> str:
        for name, data in files.items():
            fs.pipe(f"/source-test/{name}", data)
        return "memory://source-test"

    yield put
    fs.rm("/source-test", recursive=True)
