"""Files of unknown size are read up to a limit, on every kind of store."""

from __future__ import annotations

import fsspec
import pytest

from dtpipe.manifests.store.reading import PatientFiles


@pytest.mark.parametrize(("size", "read"), [(0, 0), (1, 1), (1000, 1000), (1001, 1000)])
def test_first_bytes_are_no_more_than_asked_for(size: int, read: int, store_url: str) -> None:
    """S3 answers a range of an empty object with an error."""
    data = bytes(idx % 251 for idx in range(size))
    fs, path = fsspec.core.url_to_fs(store_url)
    fs.makedirs(path, exist_ok=True)
    fs.pipe(f"{path}/a", data)
    files = PatientFiles(store_url)
    assert files.first_bytes(f"{files.path}/a", 1000) == data[:read]
    with pytest.raises(FileNotFoundError):
        files.first_bytes(f"{files.path}/gone", 1000)
