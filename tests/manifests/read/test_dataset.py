"""Reading: true values by row and view, unfinished datasets on request only, the same from S3, threads and forks."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtpipe.manifests.errors import ConfigError, IncompleteError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import FeatureSource, read_image, read_level
from parts import golden
from parts.fits import fit_levels

FORMATS = ("zarr", "webdataset")
NAMES = ("l2", "l3", "l4.b")


@pytest.fixture(scope="module", params=FORMATS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven rows in shards of three; one bad."""
    root = str(tmp_path_factory.mktemp(request.param) / "features")
    golden.write_shards(root, golden.Settings(format=request.param, num_rows=7, samples=3))
    return root


def expect_truth(
    dataset: FeatureSource, rows: Sequence[int], views: Sequence[int], names: Sequence[str] = NAMES
) -> None:
    """Read a batch and compare it with the values it was made of."""
    images, coded = dataset.read(np.array(rows, dtype=np.int64), names, np.array(views, dtype=np.int64))
    assert images.shape == (len(rows), 4, 6, 3)
    assert coded.names == tuple(names)
    specs = {level.name: level for level in dataset.levels}
    for idx, (row, view) in enumerate(zip(rows, views, strict=True)):
        np.testing.assert_array_equal(images[idx], golden.true_image(dataset.columns.keys[row]))
        for name, values in coded.decode().items():
            np.testing.assert_array_equal(values[idx], golden.true_level(specs[name], dataset.columns.keys[row])[view])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_has_the_true_values_in_the_order_asked_for(url: str, data: st.DataObject) -> None:
    dataset = FeatureDataset.open(url)
    rows = data.draw(st.lists(st.sampled_from(dataset.columns.ok_rows.tolist()), max_size=9))
    views = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    names = data.draw(st.lists(st.sampled_from(NAMES), unique=True))
    expect_truth(dataset, rows, views, names)


def test_columns_say_what_is_in_which_row(url: str) -> None:
    dataset = FeatureDataset.open(url)
    assert len(dataset.columns) == 7
    assert dataset.columns.keys == golden.make_listing(golden.Settings(num_rows=7)).keys
    assert [dataset.columns.row_of(key) for key in dataset.columns.keys] == list(range(7))
    assert all(
        label == key.split("/")[0] for key, label in zip(dataset.columns.keys, dataset.columns.labels, strict=True)
    )
    bad = dataset.columns.row_of("dog/3.png")
    assert dataset.columns.status[bad] == "bad: truncated file"
    assert dataset.columns.ok_rows.tolist() == [row for row in range(7) if row != bad]
    assert (dataset.image_px, len(dataset.views), [level.name for level in dataset.levels]) == ((4, 6), 2, list(NAMES))


def test_what_cannot_be_read_is_refused_with_its_name(url: str) -> None:
    dataset = FeatureDataset.open(url)
    with pytest.raises(InputError, match=r"sample 'dog/3\.png' \(row \d\) is bad: truncated file"):
        dataset.read([dataset.columns.row_of("dog/3.png")], (), [0])
    for row in (-1, 7):
        with pytest.raises(InputError, match=f"no row {row}"):
            read_image(dataset, row)
    with pytest.raises(InputError, match="no sample 'x'"):
        dataset.columns.row_of("x")
    with pytest.raises(ConfigError, match=r"no level 'l9'; choose from l2, l3, l4\.b"):
        read_level(dataset, "l9", 0)
    with pytest.raises(ConfigError, match="no view 2"):
        read_level(dataset, "l2", int(dataset.columns.ok_rows[0]), 2)
    with pytest.raises(ConfigError, match="one view per row"):
        dataset.read(dataset.columns.ok_rows, ("l2",), [0])


def test_without_images_none_are_read(url: str) -> None:
    dataset = FeatureDataset.open(url)
    images, coded = dataset.read(dataset.columns.ok_rows, ("l2",), [0] * 6, images=False)
    assert (images.shape, coded.decode()["l2"].shape) == ((0, 4, 6, 3), (6, 3, 2, 2))


@pytest.mark.parametrize("shard_format", FORMATS)
def test_unfinished_datasets_open_only_on_request(shard_format: str, tmp_path: Path) -> None:
    settings_ = golden.Settings(format=shard_format, num_rows=7, samples=3)
    golden.write_shards(tmp_path, settings_, limit=2, do_merge=False)
    with pytest.raises(IncompleteError, match="unfinished"):
        FeatureDataset.open(tmp_path)
    dataset = FeatureDataset.open(tmp_path, allow_incomplete=True)
    assert dataset.manifest is None
    assert dataset.columns.status[6] == "missing"
    assert 6 not in dataset.columns.ok_rows
    with pytest.raises(IncompleteError, match="not written yet"):
        read_image(dataset, 6)
    expect_truth(dataset, dataset.columns.ok_rows.tolist(), [1] * len(dataset.columns.ok_rows))
    golden.write_shards(tmp_path, settings_)
    assert FeatureDataset.open(tmp_path).columns.status[6] == "ok"


def test_a_folder_without_a_dataset_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no feature dataset"):
        FeatureDataset.open(tmp_path)


@pytest.mark.parametrize("shard_format", FORMATS)
def test_levels_without_images(shard_format: str, tmp_path: Path) -> None:
    golden.write_shards(tmp_path, golden.Settings(format=shard_format, images="joined"))
    dataset = FeatureDataset.open(tmp_path)
    read_level(dataset, "l2", int(dataset.columns.ok_rows[0]))
    with pytest.raises(ConfigError, match="stores no images; join it"):
        read_image(dataset, int(dataset.columns.ok_rows[0]))


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "rans"])
@pytest.mark.parametrize("shard_format", FORMATS)
def test_round_trip_over_s3(shard_format: str, coded: bool, s3_url: str, tmp_path: Path) -> None:
    levels, fitted = fit_levels(golden.LEVELS) if coded else (golden.LEVELS, {})
    settings_ = golden.Settings(format=shard_format, levels=levels, fitted=fitted)
    local, remote = golden.write_shards(tmp_path, settings_), golden.write_shards(s3_url, settings_)
    assert remote.digest == local.digest
    dataset = FeatureDataset.open(s3_url)
    if coded:  # features that were coded are not quite the true ones: the same as those of the local store
        assert read_sums(dataset) == read_sums(FeatureDataset.open(tmp_path))
    else:
        expect_truth(dataset, dataset.columns.ok_rows.tolist(), [1] * len(dataset.columns.ok_rows))


def read_sums(dataset: FeatureDataset) -> list[float]:
    """One number per level, for other processes."""
    _, coded = dataset.read(dataset.columns.ok_rows, NAMES, [0] * len(dataset.columns.ok_rows))
    return [float(values.astype(np.float64).sum()) for values in coded.decode().values()]


def test_threads_pickles_and_processes_read_the_same(url: str) -> None:
    dataset = FeatureDataset.open(url)
    expected = read_sums(dataset)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read_sums, [dataset] * 8)) == [expected] * 8
    assert read_sums(pickle.loads(pickle.dumps(dataset))) == expected


def _read_in_child(dataset: FeatureDataset, connection: object) -> None:
    connection.send(read_sums(dataset))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_reads_although_threads_do_not_survive_the_fork(url: str) -> None:
    dataset = FeatureDataset.open(url)
    expected = read_sums(dataset)  # starts the threads
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=_read_in_child, args=(dataset, sender))
    child.start()
    assert receiver.poll(30)
    assert receiver.recv() == expected
    child.join()
