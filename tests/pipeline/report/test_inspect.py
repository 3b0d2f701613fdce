"""A dataset is described by what was written into it, and a sample is drawn as it was stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtpipe.manifests.errors import ConfigError, DamagedDataError, InputError, StoreError
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.manifests.schema import ShardRecipe, ViewSpec
from dtpipe.pipeline.report.inspect import describe_dataset, draw_sample, render_sample, view_name
from dtpipe.pipeline.report.maps.pca import pca_to_rgb
from parts.damage import flip
from parts.disks import BLOCK, files_on, fill, small_disk
from parts.memory import MemorySource, level_spec, write_dataset

PX = (32, 48)
VIEWS = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=0, timestep=50, flip=True))
LEVELS = (level_spec("l2", 4, 8, PX), level_spec("l3", 8, 5, PX, dtype="float32"))
SOURCE = MemorySource(num_rows=10, bad=(3,), views=VIEWS, levels=LEVELS, image_px=PX)
BAD_KEY = "images/003.png"


def write(url: Path, store_format: str, merged: bool = True) -> str:
    """Ten samples in three shards; unmerged, the last one is missing."""
    return str(write_dataset(url, SOURCE, merged=merged, shard=ShardRecipe(samples=4, format=store_format)))


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp(request.param) / "features", request.param)


def test_description_counts_what_was_written(url: str) -> None:
    described = describe_dataset(url)
    assert described["complete"] is True
    assert len(described["digest"]) == 64
    totals = described["totals"]
    assert {name: totals[name] for name in totals if name != "size_bytes"} == {
        "num_rows": 10, "num_ok": 9, "num_bad": 1, "num_shards": 3, "num_shards_committed": 3,
    }  # fmt: skip
    assert described["labels"] == {"even": 5}
    assert [view["flip"] for view in described["views"]] == [False, True]
    assert described["recipe"]["teacher"]["kind"] == "toy"
    assert described["provenance"]["command"] == "test"


def test_description_is_one_json_document(url: str) -> None:
    assert json.loads(json.dumps(describe_dataset(url))) == describe_dataset(url)


def test_bad_samples_are_named_with_their_reason(url: str) -> None:
    (bad,) = describe_dataset(url)["bad"]
    assert (bad["key"], bad["reason"]) == (BAD_KEY, "broken")


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
    described = describe_dataset(write(tmp_path / "features", store_format, merged=False))
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
    url = write(tmp_path / "features", "zarr")
    flip(Path(url) / "index.parquet")
    with pytest.raises(DamagedDataError, match=r"index\.parquet"):
        describe_dataset(url)


# --- picture ---------------------------------------------------------------------------------------------------------


def test_picture_holds_image_and_levels_of_each_view(url: str, tmp_path: Path) -> None:
    drawn = np.asarray(Image.open(render_sample(url, "images/004.png", tmp_path / "deep" / "sample.png")))
    image = read_image(SOURCE, 4)
    expected = [image, image[:, ::-1]]
    for level in LEVELS:
        expected += pca_to_rgb([read_level(SOURCE, level.name, 4, view) for view in range(len(VIEWS))])
    for picture in expected:
        tile = Image.fromarray(np.ascontiguousarray(picture)).resize((192, 128), Image.Resampling.NEAREST)
        assert find(drawn, np.asarray(tile))


def find(canvas: np.ndarray, tile: np.ndarray) -> bool:
    """Does the tile lie somewhere on the canvas, pixel for pixel?"""
    starts = np.argwhere((canvas[: -len(tile) + 1, : -tile.shape[1] + 1] == tile[0, 0]).all(axis=2))
    return any(np.array_equal(canvas[y : y + len(tile), x : x + tile.shape[1]], tile) for y, x in starts)


def test_bad_and_unknown_samples_are_not_drawn(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images/003\.png.*broken"):
        render_sample(url, BAD_KEY, tmp_path / "x.png")
    with pytest.raises(InputError, match=r"no/such\.png"):
        render_sample(url, "no/such.png", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_damaged_level_is_not_drawn(tmp_path: Path) -> None:
    url = write(tmp_path / "features", "webdataset")
    for path in (Path(url) / "data").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX"))
    with pytest.raises(DamagedDataError, match="00"):
        render_sample(url, "images/004.png", tmp_path / "x.png")


def test_unwritable_picture_names_the_file(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"x\.png lies below .*/file, which is a file"):
        render_sample(url, "images/004.png", tmp_path / "file" / "x.png")


def test_a_picture_that_finds_no_room_leaves_nothing(url: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        fill(disk, BLOCK)
        with pytest.raises(StoreError, match=r"x\.png: cannot be written \(No space left"):
            render_sample(url, "images/004.png", disk / "x.png")
        assert files_on(disk) == set()


def test_sample_without_image_shows_levels_alone() -> None:
    levels = {level.name: [read_level(SOURCE, level.name, 4, view) for view in (0, 1)] for level in LEVELS}
    alone = draw_sample("key", None, VIEWS, LEVELS, levels)
    beside = draw_sample("key", read_image(SOURCE, 4), VIEWS, LEVELS, levels)
    assert alone.width < beside.width
    assert alone.height == beside.height


def test_view_names_say_what_differs() -> None:
    assert [view_name(view) for view in VIEWS] == ["draw 0, timestep 50", "draw 0, timestep 50, flipped"]
