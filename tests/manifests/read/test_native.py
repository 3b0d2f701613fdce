"""Reading by compiled code: the values of plain zarr and of reading chunk by chunk, and the same errors."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from dtpipe.manifests.codecs.base import array_name, decode_level
from dtpipe.manifests.errors import DamagedDataError, DtpipeError
from dtpipe.manifests.layout.arrays import stored_arrays
from dtpipe.manifests.read import chunks, functions, native
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.located import LocatedChunks
from dtpipe.manifests.store import open_files
from dtpipe.manifests.store.store import Store
from parts import golden
from parts.damage import flip
from parts.fits import fit_levels
from parts.zarr_readers import register_entry_points

NAMES = ("l2", "l3", "l4.b")
NEVER = 10**9  # chunks


LEVELS, FITTED_FILES = fit_levels(golden.LEVELS)
RANS = {"levels": LEVELS, "fitted": FITTED_FILES}
FORMS = {
    "zarr": {},
    "plain": {"zstd_level": 0},
    "webdataset": {"format": "webdataset"},
    "rans": RANS,
    "webdataset rans": {"format": "webdataset", **RANS},
}


@pytest.fixture(scope="module", params=FORMS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param) / "features", request.param)


def write(root: Path, form: str) -> Path:
    """Thirteen rows in shards of three; one bad."""
    golden.write_shards(root, golden.Settings(**{"num_rows": 13, "samples": 3, **FORMS[form]}))
    return root


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code from the first chunk on."""
    monkeypatch.setattr(chunks, "NATIVE_FROM", 0)


@pytest.fixture
def chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the chunks that were decoded one by one."""
    rows: list[int] = []
    true = chunks.ChunkReader._decode

    def decode(self: chunks.ChunkReader, chunk: chunks._Chunk, data: bytes) -> None:
        rows.append(chunk.row)
        true(self, chunk, data)

    monkeypatch.setattr(chunks.ChunkReader, "_decode", decode)
    return rows


def read(dataset: FeatureDataset, rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    images, coded = dataset.read(rows, NAMES, views)
    return {"image": images, **coded.decode()}


def requests_of(dataset: FeatureDataset, num: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random rows, unsorted and with duplicates, across shards, with random views."""
    rng = np.random.default_rng(0)
    for _ in range(num):
        rows = rng.choice(dataset.columns.ok_rows, rng.integers(1, 25))
        yield rows, rng.integers(0, 2, len(rows))


@pytest.mark.parametrize("form", ["zarr", "plain", "rans"])
def test_random_requests_have_the_values_of_plain_zarr_and_none_is_read_chunk_by_chunk(
    tmp_path: Path, chunk_by_chunk: list[int], form: str
) -> None:
    dataset = FeatureDataset.open(write(tmp_path / "features", form))
    chunk_by_chunk.clear()
    register_entry_points()
    group = zarr.open_group(str(tmp_path / "features" / "data.zarr"), mode="r")
    truth = {name: np.asarray(array[:]) for name, array in group.arrays()}
    for rows, views in requests_of(dataset, 8):
        arrays = read(dataset, rows, views)
        np.testing.assert_array_equal(arrays["image"], truth["image"][rows])
        for name, codec in dataset.codecs.items():
            parts = {part: truth[array_name(name, part)][rows, views] for part in codec.parts}
            np.testing.assert_array_equal(arrays[name], decode_level(codec, parts))
    assert not chunk_by_chunk


def test_both_ways_of_reading_give_the_same(
    url: Path, monkeypatch: pytest.MonkeyPatch, chunk_by_chunk: list[int]
) -> None:
    dataset = FeatureDataset.open(url)
    asked = [*requests_of(dataset, 8)]
    chunk_by_chunk.clear()
    compiled = [read(dataset, *request) for request in asked]
    num_one_by_one = len(chunk_by_chunk)
    monkeypatch.setattr(chunks, "NATIVE_FROM", NEVER)
    for request, arrays in zip(asked, compiled, strict=True):
        for name, plain in read(dataset, *request).items():
            np.testing.assert_array_equal(arrays[name], plain)
    num_images = sum(len(rows) for rows, _ in asked)
    assert num_one_by_one == (0 if dataset.recipe.shard.format == "zarr" else num_images)  # PNGs
    assert len(chunk_by_chunk) == num_one_by_one + len(stored_arrays(dataset.recipe)) * num_images


def _shift(path: Path) -> None:
    path.write_bytes(b"\0" + path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "shifted": _shift,
}


def problem(dataset: FeatureDataset) -> str:
    """The error of reading all rows and views; empty without one."""
    try:
        for view in range(2):
            read(dataset, dataset.columns.ok_rows, np.full(len(dataset.columns.ok_rows), view))
    except DtpipeError as err:
        return f"{type(err).__name__}: {err}"
    return ""


def objects_of(root: Path) -> list[Path]:
    return sorted(path for folder in ("data", "data.zarr") for path in (root / folder).rglob("*") if _is_object(path))


def _is_object(path: Path) -> bool:
    return path.is_file() and path.name != "zarr.json"


def expect_same_error(dataset: FeatureDataset, monkeypatch: pytest.MonkeyPatch) -> str:
    found = {}
    monkeypatch.setattr(chunks, "_num_threads", lambda: 1)  # the first damage in the order of objects is the one named
    for start in (0, NEVER):
        monkeypatch.setattr(chunks, "NATIVE_FROM", start)
        found[start] = problem(dataset)
    assert found[0] == found[NEVER]
    return found[0]


def test_every_flipped_byte_has_the_error_of_reading_chunk_by_chunk(
    url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(url, tmp_path / "features")
    dataset = FeatureDataset.open(root)
    path = objects_of(root)[-2]  # of l4.b, or a tar
    data, num_found = path.read_bytes(), 0
    for place in range(0, len(data), max(1, len(data) // 40)):
        flip(path, place, 0x10)
        num_found += bool(expect_same_error(dataset, monkeypatch))
        path.write_bytes(data)
    assert num_found > 4  # headers and padding of a tar, and empty slots of an index, are nobody's


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_damages_have_the_same_errors_too(
    url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    root = shutil.copytree(url, tmp_path / "features")
    path = objects_of(root)[-2]
    DAMAGES[damage](path)
    assert path.relative_to(root).as_posix() in expect_same_error(FeatureDataset.open(root), monkeypatch)


def test_an_object_in_anothers_place_is_not_read(url: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shutil.copytree(url, tmp_path / "features")
    one, other = objects_of(root)[-2:]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert "DamagedDataError" in expect_same_error(FeatureDataset.open(root), monkeypatch)


def test_damage_that_comes_after_a_file_was_opened_is_found(url: Path, tmp_path: Path) -> None:
    root = shutil.copytree(url, tmp_path / "features")
    dataset = FeatureDataset.open(root)
    rows, views = dataset.columns.ok_rows, np.zeros(len(dataset.columns.ok_rows), np.int64)
    before = read(dataset, rows, views)
    for path in objects_of(root):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 3)
    with pytest.raises(DamagedDataError, match="cut short"):
        read(dataset, rows, views)
    assert before["l2"].any()


@pytest.mark.parametrize("form", ["rans", "webdataset rans"])
def test_chunks_left_as_they_are_stored_are_those_and_checked_as_all_are(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = FeatureDataset.open(write(tmp_path / "features", form))
    asked = [*requests_of(dataset, 3)]
    expected = [read(dataset, *request) for request in asked]
    dataset.keeps_packed = True
    for start in (0, NEVER):
        monkeypatch.setattr(chunks, "NATIVE_FROM", start)
        for request, truth in zip(asked, expected, strict=True):
            for name, values in read(dataset, *request).items():
                np.testing.assert_array_equal(values, truth[name])
    path = objects_of(tmp_path / "features")[0 if form == "webdataset rans" else -2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert path.name in expect_same_error(dataset, monkeypatch)


def test_without_the_libraries_all_is_read_chunk_by_chunk(
    url: Path, monkeypatch: pytest.MonkeyPatch, chunk_by_chunk: list[int]
) -> None:
    dataset = FeatureDataset.open(url)
    rows, views = dataset.columns.ok_rows, np.ones(len(dataset.columns.ok_rows), np.int64)
    compiled = read(dataset, rows, views)
    chunk_by_chunk.clear()
    monkeypatch.setattr(functions, "_FUNCTIONS", (*functions._FUNCTIONS, "no_such_function"))
    native._kernel.cache_clear()
    try:
        assert not native.available()
        for name, values in read(dataset, rows, views).items():
            np.testing.assert_array_equal(values, compiled[name])
    finally:
        native._kernel.cache_clear()
    assert len(chunk_by_chunk) == len(stored_arrays(dataset.recipe)) * len(rows)


def test_more_objects_than_files_are_kept_open_and_many_threads(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_MOST", 2)
    dataset = FeatureDataset.open(url)
    asked = [*requests_of(dataset, 12)]
    expected = [read(dataset, *request) for request in asked]
    with ThreadPoolExecutor(6) as pool:
        for arrays, true in zip(
            pool.map(lambda request: read(dataset, *request), asked * 3), expected * 3, strict=True
        ):
            for name, values in arrays.items():
                np.testing.assert_array_equal(values, true[name])
    assert len(dataset._chunks._files._files) == 2


def _read_in_child(dataset: FeatureDataset, connection: object) -> None:
    rows = dataset.columns.ok_rows
    connection.send(read(dataset, rows, np.zeros_like(rows)))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_reads_by_compiled_code_whatever_other_threads_held(url: Path) -> None:
    dataset = FeatureDataset.open(url)
    rows = dataset.columns.ok_rows
    expected = read(dataset, rows, np.zeros_like(rows))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=_read_in_child, args=(dataset, sender))
    with dataset._chunks._files._changing, dataset._buffers._changing, native._loading:  # as another thread may hold
        child.start()
    assert receiver.poll(30)
    for name, values in receiver.recv().items():
        np.testing.assert_array_equal(values, expected[name])
    child.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_reads_that_go_on_at_once_share_the_cores(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, cut = FeatureDataset.open(url), LocatedChunks.cut
    rows, seen = dataset.columns.ok_rows, list[int]()
    monkeypatch.setattr(chunks, "_num_threads", lambda: 5)
    monkeypatch.setattr(LocatedChunks, "cut", lambda *args: seen.append(args[1]) or cut(*args))  # type: ignore[func-returns-value]

    def read_all() -> None:
        read(dataset, rows, np.zeros_like(rows))

    started, enough = threading.Barrier(3), threading.Event()

    def hold() -> None:
        with chunks._share_of_cores():
            started.wait(30)
            enough.wait(30)

    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(hold) for _ in range(2)]
        started.wait(30)
        read_all()
        child = multiprocessing.get_context("fork").Process(target=_expect_all_cores)
        child.start()
        child.join(30)
        enough.set()
        [one.result() for one in held]
    with pytest.raises(DamagedDataError), chunks._share_of_cores():
        raise DamagedDataError("as a read may end")
    read_all()
    assert seen == [1, 5]
    assert child.exitcode == 0


def _expect_all_cores() -> None:
    with chunks._share_of_cores() as num_cores:
        sys.exit(num_cores != 5)  # whoever was in a read does not live in this process


def test_an_open_file_is_closed_when_nobody_holds_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    file = Store(tmp_path).open("a")
    link = Path(f"/proc/self/fd/{file.descriptor}")
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to look at descriptors in")
    assert link.resolve() == (tmp_path / "a").resolve()
    del file
    assert not link.exists()
