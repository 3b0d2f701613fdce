"""Datasets read through the cache of remote data: true values from it whatever happens to it, within its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dtpipe.manifests.errors import DamagedDataError, StoreError
from dtpipe.manifests.read import chunks
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.store.cache import ObjectCache
from dtpipe.manifests.store.remote import RemoteFiles
from parts import golden
from parts.damage import flipped

NAMES = ("l2", "l3", "l4.b")
URL = "memory://cache-test/features"
PLENTY = 10**9


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows in shards of three."""
    root = tmp_path_factory.mktemp(request.param) / "features"
    golden.write_shards(root, golden.Settings(format=request.param, num_rows=9, samples=3))
    return root


@pytest.fixture(autouse=True)
def remote(whole: Path) -> Iterator[None]:
    """The dataset in a store that is no disk."""
    files = fsspec.filesystem("memory")
    for path in whole.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/cache-test/features/{path.relative_to(whole)}", path.read_bytes())
    yield
    files.rm("/cache-test", recursive=True)


@pytest.fixture(params=[0, 10**9], ids=["compiled", "chunk by chunk"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "NATIVE_FROM", request.param)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that the store is asked for parts of."""
    names: list[str] = []
    true = RemoteFiles.read_ranges

    def read_ranges(self: RemoteFiles, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        names.extend(name for name, _, _ in ranges)
        return true(self, ranges)

    monkeypatch.setattr(RemoteFiles, "read_ranges", read_ranges)
    return names


def read(dataset: FeatureDataset) -> list[np.ndarray]:
    rows = dataset.columns.ok_rows
    images, coded = dataset.read(rows, NAMES, np.arange(len(rows)) % 2)
    return [images, *coded.decode().values()]


def expect_truth(whole: Path, dataset: FeatureDataset) -> None:
    for one, other in zip(read(dataset), read(FeatureDataset.open(whole)), strict=True):
        np.testing.assert_array_equal(one, other)


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_what_was_read_once_is_not_asked_for_again(whole: Path, tmp_path: Path, asked: list[str]) -> None:
    cache = ObjectCache(tmp_path / "cache", PLENTY)
    dataset = FeatureDataset.open(URL, cache=cache)
    num_before = len(asked)  # opening looks at a few chunks
    expect_truth(whole, dataset)
    fetched = asked[num_before:]
    assert len(fetched) == len(set(fetched)) == len(kept(tmp_path / "cache"))
    second = FeatureDataset.open(URL, cache=cache)
    asked.clear()
    expect_truth(whole, second)
    assert not asked
    objects = [
        path.read_bytes() for folder in ("data", "data.zarr") for path in (whole / folder).rglob("*") if path.is_file()
    ]
    assert set(kept(tmp_path / "cache").values()) <= set(objects)


def _ruin(path: Path, how: str) -> None:
    data = path.read_bytes()
    changed = {"flipped": flipped(data, 7), "zeros": bytes(len(data)), "cut": data[:-3], "longer": data + b"x"}[how]
    path.write_bytes(changed)


@pytest.mark.parametrize("how", ["flipped", "zeros", "cut", "longer"])
@pytest.mark.parametrize("when", ["open", "closed"])
def test_damage_in_the_cache_is_noticed_and_fetched_again(whole: Path, tmp_path: Path, how: str, when: str) -> None:
    cache = ObjectCache(tmp_path / "cache", PLENTY)
    dataset = FeatureDataset.open(URL, cache=cache)
    expect_truth(whole, dataset)
    before = kept(cache.folder)
    for name in before:
        _ruin(cache.folder / name, how)
    dataset = dataset if when == "open" else FeatureDataset.open(URL, cache=cache)
    expect_truth(whole, dataset)
    expect_truth(whole, FeatureDataset.open(URL, cache=cache))
    touched = {name for name, data in kept(cache.folder).items() if data == before[name]}
    assert touched == set(before) or how in ("flipped", "longer")  # byte 7 is nobody's in a tar, nor what comes after


def test_the_cache_stays_within_its_bytes_and_keeps_what_was_used_last(whole: Path, tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "all", PLENTY)
    expect_truth(whole, FeatureDataset.open(URL, cache=cache))
    sizes = sorted(map(len, kept(cache.folder).values()))
    small = ObjectCache(tmp_path / "small", sum(sizes) // 2)
    for _ in range(2):
        expect_truth(whole, FeatureDataset.open(URL, cache=small))
        assert 0 < sum(map(len, kept(small.folder).values())) <= small.most_bytes
    tiny = ObjectCache(tmp_path / "tiny", sizes[0] - 1)
    expect_truth(whole, FeatureDataset.open(URL, cache=tiny))
    assert not tiny.folder.exists() or not kept(tiny.folder)


def test_a_damaged_object_of_the_dataset_is_the_same_error_and_is_not_kept(whole: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    path = next(path for path in sorted(whole.rglob("*")) if path.name in ("0", "00000.tar") and path.is_file())
    at = f"/cache-test/features/{path.relative_to(whole)}"
    data = files.cat_file(at)
    files.pipe_file(at, bytes(byte ^ 1 for byte in data))
    cache = ObjectCache(tmp_path / "cache", PLENTY)
    with pytest.raises(DamagedDataError) as plain:
        read(FeatureDataset.open(URL))
    with pytest.raises(DamagedDataError) as cached:
        read(FeatureDataset.open(URL, cache=cache))
    assert str(path.relative_to(whole)) in str(plain.value)
    assert str(path.relative_to(whole)) in str(cached.value)
    assert data not in kept(cache.folder).values()
    assert not any(name.endswith(".tmp") for name in kept(cache.folder))


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cache of remote data cannot be written"):
        read(FeatureDataset.open(URL, cache=ObjectCache(tmp_path / "file" / "cache", PLENTY)))
