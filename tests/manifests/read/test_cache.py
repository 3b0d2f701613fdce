"""Datasets read through the cache of remote data: true values from it whatever happens to it, within its bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from blake3 import blake3

from dtpipe.manifests.errors import DamagedDataError, StoreError
from dtpipe.manifests.read import chunks
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.store.cache import ObjectCache
from dtpipe.manifests.store.remote import RemoteFiles
from parts import golden
from parts.damage import flipped
from parts.disks import BLOCK, fill, small_disk

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
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Objects that the store is asked for parts of, and the bytes of each part."""
    parts: list[tuple[str, int]] = []
    true = RemoteFiles.read_ranges

    def read_ranges(self: RemoteFiles, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        parts.extend((name, size) for name, _, size in ranges)
        return true(self, ranges)

    monkeypatch.setattr(RemoteFiles, "read_ranges", read_ranges)
    return parts


def read(dataset: FeatureDataset) -> list[np.ndarray]:
    rows = dataset.columns.ok_rows
    images, coded = dataset.read(rows, NAMES, np.arange(len(rows)) % 2)
    return [images, *coded.decode().values()]


def expect_truth(whole: Path, dataset: FeatureDataset) -> None:
    for one, other in zip(read(dataset), read(FeatureDataset.open(whole)), strict=True):
        np.testing.assert_array_equal(one, other)


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if not path.name.endswith(".lock")}


def test_what_was_read_once_is_not_asked_for_again(whole: Path, tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    cache = ObjectCache(tmp_path / "cache", PLENTY)
    dataset = FeatureDataset.open(URL, cache=cache)
    num_before = len(asked)  # opening looks at a few chunks
    expect_truth(whole, dataset)
    fetched = [name for name, _ in asked[num_before:]]
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


def expect_true_row(whole: FeatureDataset, dataset: FeatureDataset, row: int) -> None:
    images, coded = dataset.read([row], NAMES, [row % 2])
    true_images, true_coded = whole.read([row], NAMES, [row % 2])
    for one, other in zip(
        [images, *coded.decode().values()], [true_images, *true_coded.decode().values()], strict=True
    ):
        np.testing.assert_array_equal(one, other)


def bytes_by_epoch(whole: Path, cache: ObjectCache | None, asked: list[tuple[str, int]]) -> list[int]:
    """What the store is asked for when all rows are read one by one in an order that jumps, thrice."""
    plain, dataset, sizes = FeatureDataset.open(whole), FeatureDataset.open(URL, cache=cache), []
    rows = np.array(sorted(plain.columns.ok_rows, key=lambda row: (row % 3, row)))
    for _ in range(3):
        asked.clear()
        for row in rows.tolist():
            expect_true_row(plain, dataset, row)
            assert cache is None or bytes_on_disk(cache.folder) <= cache.most_bytes
        sizes.append(sum(size for _, size in asked))
    return sizes


def bytes_on_disk(folder: Path) -> int:
    """Of what is kept, and of what this process keeps open that has no name any more."""
    links = list(Path("/proc/self/fd").glob("*"))
    nameless = {link.stat().st_ino: link.stat().st_size for link in links if _is_dropped(link, folder)}
    return sum(map(len, kept(folder).values())) + sum(nameless.values())


def shard_bytes() -> int:
    manifest = FeatureDataset.open(URL).manifest
    assert manifest is not None
    return manifest.totals.size_bytes


def _is_dropped(link: Path, folder: Path) -> bool:
    target = str(link.readlink()) if link.is_symlink() else ""
    return target.startswith(f"{folder}/") and target.endswith(" (deleted)")


def test_a_cache_smaller_than_the_dataset_keeps_a_part_and_reads_of_the_rest_what_it_needs(
    whole: Path, tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    size_bytes = shard_bytes()
    without = bytes_by_epoch(whole, None, asked)
    small = ObjectCache(tmp_path / "small", size_bytes // 2)
    first, second, third = bytes_by_epoch(whole, small, asked)
    assert first <= without[0] + small.most_bytes
    names = kept(small.folder).keys()
    assert names and second == third < without[1]
    assert kept(small.folder).keys() == names
    sizes = sorted(map(len, kept(small.folder).values()))
    tiny = ObjectCache(tmp_path / "tiny", sizes[0] // 100)
    assert bytes_by_epoch(whole, tiny, asked) == without


def test_what_makes_room_takes_no_bytes_although_it_is_still_open(whole: Path, tmp_path: Path) -> None:
    size_bytes = shard_bytes()
    dataset = FeatureDataset.open(URL, cache=ObjectCache(tmp_path, size_bytes))
    expect_truth(whole, dataset)  # and keeps its files open
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    other, content = ObjectCache(tmp_path, size_bytes), bytes(size_bytes)
    assert other.open(blake3(content).hexdigest(), size_bytes, lambda ranges: [bytes(size) for _, size in ranges])
    assert kept(tmp_path) == {blake3(content).hexdigest(): content}
    assert bytes_on_disk(tmp_path) == size_bytes
    expect_truth(whole, dataset)


def test_a_full_disk_does_not_end_a_run_and_is_said_once(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 40 * BLOCK) as disk:
        dataset = FeatureDataset.open(URL, cache=ObjectCache(disk / "cache", PLENTY))
        filling = fill(disk, 2 * BLOCK)
        for _ in range(2):
            expect_truth(whole, dataset)
        (record,) = caplog.records
        assert "nothing more can be kept in the cache" in record.message and "No space left" in record.message
        filling.unlink()
        assert not any(name.endswith(".tmp") for name in kept(disk / "cache"))


def test_a_cache_that_may_only_be_read_is_read(
    whole: Path, tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ObjectCache(tmp_path, PLENTY)
    expect_truth(whole, FeatureDataset.open(URL, cache=cache))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    dataset = FeatureDataset.open(URL, cache=cache)
    asked.clear()
    monkeypatch.setattr(os, "utime", refuse)
    expect_truth(whole, dataset)
    assert not asked


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
