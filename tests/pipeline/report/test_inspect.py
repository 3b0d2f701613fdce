"""A dataset is described by what was written into it, and a sample is drawn as it was stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtpipe.extract.sources import SourceItem
from dtpipe.manifests.errors import DamagedDataError, InputError, StoreError
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.schema import IndexRow, Recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import commit_entry, merge
from dtpipe.manifests.write.listing import build_listing
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import plan_digest, start_plan
from dtpipe.manifests.write.shard import ShardArrays, write_shard
from dtpipe.pipeline.report.inspect import describe_dataset, draw_sample, render_sample, view_name
from dtpipe.pipeline.report.pca import pca_to_rgb

BAD_KEY = "cat/03.png"


def recipe(store_format: str) -> Recipe:
    return Recipe.model_validate(
        {
            "source": {"kind": "class_folder"},
            "transform": {"height": 32, "width": 48},
            "student_px": (32, 48),
            "teacher": {"kind": "toy", "weights_blake3": "a" * 64},
            "views": [{"draw": 0, "timestep": 50}, {"draw": 0, "timestep": 50, "flip": True}],
            "levels": [
                {"name": "l2", "stride": 4, "channels": 8, "height": 8, "width": 12, "tap": "up.3"},
                {"name": "l3", "stride": 8, "channels": 5, "height": 4, "width": 6, "tap": "up.2", "dtype": "float32"},
            ],
            "shard": {"samples": 4, "format": store_format},
            "compute": {"device": "cpu", "batch_size": 2, "threads": 1},
        }
    )


def shard_arrays(rows: range, keys: tuple[str, ...], labels: tuple[str | None, ...]) -> ShardArrays:
    """Noise by row, zeros for the bad sample."""
    image = np.stack(
        [np.random.Generator(np.random.Philox(row)).integers(0, 256, (32, 48, 3), dtype=np.uint8) for row in rows]
    )
    levels = {
        "l2": np.stack(
            [np.random.Generator(np.random.Philox(row)).normal(size=(2, 8, 8, 12)).astype(np.float16) for row in rows]
        ),
        "l3": np.stack(
            [np.random.Generator(np.random.Philox(row)).normal(size=(2, 5, 4, 6)).astype(np.float32) for row in rows]
        ),
    }
    for idx, row in enumerate(rows):
        if keys[row] == BAD_KEY:
            for array in (image, *levels.values()):
                array[idx] = 0
    status = {BAD_KEY: "bad: truncated file"}
    records = [
        IndexRow(row=row, key=keys[row], shard=row // 4, status=status.get(keys[row], "ok"), label=labels[row])
        for row in rows
    ]
    return ShardArrays(image, levels, records)


def write_dataset(url: str, store_format: str, num_shards: int = 3) -> str:
    """Ten samples in three shards, of which the first `num_shards` are committed; merged when all are."""
    store = Store(url)
    items = [
        SourceItem(f"{'cat' if idx % 2 else 'dog'}/{idx:02d}.png", f"x{idx}", "cat" if idx % 2 else "dog")
        for idx in range(10)
    ]
    with Lock.acquire(store, stale_s=60) as lock:
        plan, listing = start_plan(store, recipe(store_format), build_listing(items), {"command": "test"})
        if store_format == "zarr":
            write_zarr_metadata(store, plan)
        for shard_idx in range(num_shards):
            arrays = shard_arrays(plan.shard_rows(shard_idx), listing.keys, listing.labels)
            commit_entry(
                store, write_shard(store, plan, plan_digest(store), shard_idx, arrays, lock.epoch, {}), lock.epoch
            )
        if num_shards == plan.num_shards:
            merge(store, plan, lock, {"command": "test"})
    return url


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp(request.param) / "features"), request.param)


def test_description_counts_what_was_written(url: str) -> None:
    described = describe_dataset(url)
    assert described["complete"] is True
    assert len(described["digest"]) == 64
    totals = described["totals"]
    assert {name: totals[name] for name in totals if name != "size_bytes"} == {
        "num_rows": 10, "num_ok": 9, "num_bad": 1, "num_shards": 3, "num_shards_committed": 3,
    }  # fmt: skip
    assert described["labels"] == {"cat": 5, "dog": 5}
    assert [view["flip"] for view in described["views"]] == [False, True]
    assert described["recipe"]["teacher"]["kind"] == "toy"
    assert described["provenance"]["command"] == "test"


def test_description_is_one_json_document(url: str) -> None:
    assert json.loads(json.dumps(describe_dataset(url))) == describe_dataset(url)


def test_bad_samples_are_named_with_their_reason(url: str) -> None:
    (bad,) = describe_dataset(url)["bad"]
    assert (bad["key"], bad["reason"]) == (BAD_KEY, "truncated file")


def test_bytes_are_those_on_disk(url: str) -> None:
    described = describe_dataset(url)
    folder = Path(url) / ("data.zarr" if described["recipe"]["shard"]["format"] == "zarr" else "data")
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json")
    assert described["totals"]["size_bytes"] == on_disk
    parts = [described["images"], *described["levels"]]
    assert sum(part["size_bytes"] for part in parts) + described["overhead_bytes"] == on_disk
    assert 0 < described["overhead_bytes"] < on_disk * 0.6  # tiny members, and tar pads each to blocks of 512


def test_compression_compares_with_raw_arrays(url: str) -> None:
    described = describe_dataset(url)
    assert [level["raw_bytes"] for level in described["levels"]] == [10 * 2 * 8 * 8 * 12 * 2, 10 * 2 * 5 * 4 * 6 * 4]
    assert described["images"]["raw_bytes"] == 10 * 32 * 48 * 3
    for part in (described["images"], *described["levels"]):
        assert part["ratio"] == pytest.approx(part["raw_bytes"] / part["size_bytes"], abs=1e-3)
        assert 0.5 < part["ratio"] < 1.6  # noise hardly packs; one row in ten is zeros


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_unfinished_dataset_is_described_as_far_as_it_is(tmp_path: Path, store_format: str) -> None:
    described = describe_dataset(write_dataset(str(tmp_path / "features"), store_format, num_shards=2))
    assert described["complete"] is False
    assert described["digest"] is None
    assert described["totals"]["num_shards"] == 3
    assert described["totals"]["num_shards_committed"] == 2
    assert described["totals"]["num_rows"] == 10
    assert described["totals"]["num_ok"] + described["totals"]["num_bad"] == 8
    assert described["levels"][0]["raw_bytes"] == 8 * 2 * 8 * 8 * 12 * 2


def test_missing_dataset_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises((InputError, DamagedDataError), match="nothing"):
        describe_dataset(str(tmp_path / "nothing"))


def test_damaged_index_is_not_described(tmp_path: Path) -> None:
    url = write_dataset(str(tmp_path / "features"), "zarr")
    index = Path(url) / "index.parquet"
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"index\.parquet"):
        describe_dataset(url)


# --- picture ---------------------------------------------------------------------------------------------------------


def test_picture_holds_image_and_levels_of_each_view(url: str, tmp_path: Path) -> None:
    key, row = "dog/04.png", row_of(url, "dog/04.png")
    drawn = np.asarray(Image.open(render_sample(url, key, tmp_path / "deep" / "sample.png")))
    arrays = shard_arrays(range(row, row + 1), keys_of(url), (None,) * 10)
    assert arrays.image is not None
    expected = [arrays.image[0], arrays.image[0][:, ::-1]]
    expected += [picture for level in ("l2", "l3") for picture in pca_to_rgb(list(arrays.levels[level][0]))]
    for picture in expected:
        assert find(
            drawn,
            np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((192, 128), Image.Resampling.NEAREST)),
        )


def keys_of(url: str) -> tuple[str, ...]:
    import pyarrow.parquet as pq

    return tuple(pq.read_table(Path(url) / "listing.parquet")["key"].to_pylist())


def row_of(url: str, key: str) -> int:
    return keys_of(url).index(key)


def find(canvas: np.ndarray, tile: np.ndarray) -> bool:
    """Does the tile lie somewhere on the canvas, pixel for pixel?"""
    starts = np.argwhere((canvas[: -len(tile) + 1, : -tile.shape[1] + 1] == tile[0, 0]).all(axis=2))
    return any(np.array_equal(canvas[y : y + len(tile), x : x + tile.shape[1]], tile) for y, x in starts)


def test_bad_and_unknown_samples_are_not_drawn(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cat/03\.png.*truncated file"):
        render_sample(url, BAD_KEY, tmp_path / "x.png")
    with pytest.raises(InputError, match=r"no/such\.png"):
        render_sample(url, "no/such.png", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_damaged_level_is_not_drawn(tmp_path: Path) -> None:
    url = write_dataset(str(tmp_path / "features"), "webdataset")
    for path in (Path(url) / "data").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX"))
    with pytest.raises(DamagedDataError, match="00"):
        render_sample(url, "dog/04.png", tmp_path / "x.png")


def test_unwritable_picture_names_the_file(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"x\.png: cannot be written"):
        render_sample(url, "dog/04.png", tmp_path / "file" / "x.png")


def test_sample_without_image_shows_levels_alone() -> None:
    spec = recipe("zarr")
    rng = np.random.Generator(np.random.Philox(0))
    levels = {
        level.name: [rng.normal(size=(level.channels, level.height, level.width)) for _ in spec.views]
        for level in spec.levels
    }
    alone = draw_sample("key", None, spec.views, spec.levels, levels)
    beside = draw_sample("key", np.zeros((32, 48, 3), np.uint8), spec.views, spec.levels, levels)
    assert alone.width < beside.width
    assert alone.height == beside.height


def test_view_names_say_what_differs() -> None:
    assert [view_name(view) for view in recipe("zarr").views] == ["draw 0, timestep 50", "draw 0, timestep 50, flipped"]
