"""Every file is sealed and every digest fits, but rows, shards or datasets were exchanged: opening says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import ManifestError
from dtpipe.manifests.read.dataset import FeatureDataset
from parts import golden
from parts.reseal import Rows, edit_document, edit_table, rename_files, swap

FORMATS = ("zarr", "webdataset")
EVEN = {"num_rows": 8, "samples": 4, "bad": ("dog/3.png",)}


@pytest.fixture(scope="module", params=FORMATS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of four rows, one bad."""
    root = tmp_path_factory.mktemp("exchanges") / "features"
    golden.write_shards(root, golden.Settings(format=request.param, **EVEN))
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(whole, tmp_path / "features")


def of_shard(rows: Rows, shard_idx: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["shard"] == shard_idx]


def exchange_shards(rows: Rows) -> None:
    for row in rows:
        row["shard"] = 1 - row["shard"]
    rows.sort(key=lambda row: row["shard"])


def exchange_names(rows: Rows) -> None:
    for one, other in zip(of_shard(rows, 0), of_shard(rows, 1), strict=True):
        swap([one, other], 0, 1, "name", "blake3", "size_bytes", "arrays")


def exchange_arrays(rows: Rows) -> None:
    """l2 is where l3 lies, and the other way round."""
    for row in rows:
        for array in row["arrays"]:
            array["name"] = {"l2": "l3", "l3": "l2"}.get(array["name"], array["name"])
        row["arrays"].sort(key=lambda array: array["name"])


def exchange_rows(rows: Rows) -> None:
    """The first two rows of shard 0 in all arrays."""
    for row in of_shard(rows, 0):
        for array in row["arrays"]:
            views = len(array["size"]) // 4
            for field in ("offset", "size", "crc32c"):
                chunks = array[field]
                array[field] = chunks[views : 2 * views] + chunks[:views] + chunks[2 * views :]


def exchange_views(rows: Rows) -> None:
    for row in of_shard(rows, 0):
        for array in row["arrays"]:
            if array["name"] == "l2":
                for field in ("offset", "size", "crc32c"):
                    array[field][:2] = array[field][1::-1]


def exchange_status(rows: Rows) -> None:
    bad = next(row["row"] for row in rows if row["status"] != "ok")
    swap(rows, bad, (bad + 1) % 8, "status", "original_height", "original_width")


def spoil_digest(document: dict[str, Any]) -> None:
    document["digest"] = "ab" * 32


def spoil_totals(document: dict[str, Any]) -> None:
    document["totals"] |= {"num_ok": 8, "num_bad": 0}


TABLES: dict[str, tuple[str, Callable[[Rows], object], str]] = {
    "keys": ("index.parquet", lambda rows: swap(rows, 0, 1, "key"), r"index\.parquet: row 0 has key '.*', the listing"),
    "labels": ("index.parquet", lambda rows: swap(rows, 0, 1, "label"), r"index\.parquet: row \d has label '"),
    "statuses": (
        "index.parquet",
        exchange_status,
        r"sample '.*' \(row \d\) is bad: truncated file, but its \w+ is not",
    ),
    "shards": ("shards.parquet", exchange_shards, r"shard 0 has \w+ in '.*1.*', the plan implies"),
    "objects": ("shards.parquet", exchange_names, r"shard 0 has \w+ in '.*1.*', the plan implies"),
    "levels": ("shards.parquet", exchange_arrays, r"shard 0 has "),
    "rows": ("shards.parquet", exchange_rows, r"shard 0 has chunks of \w+ out of their order"),
    "views": ("shards.parquet", exchange_views, r"shard 0 has chunks of \w+ out of their order"),
    "status of all": (
        "index.parquet",
        lambda rows: [row.update(status="ok") for row in rows],
        r"manifest\.json: says num_ok 7, the tables give 8",
    ),
}


@pytest.mark.parametrize("what", TABLES)
def test_opening_refuses_what_was_exchanged_in_a_table(root: Path, what: str) -> None:
    name, change, message = TABLES[what]
    FeatureDataset.open(root)
    if what == "labels":  # of two rows that have other ones
        keys = FeatureDataset.open(root).columns.labels
        other = next(row for row in range(8) if keys[row] != keys[0])
        edit_table(root, name, lambda rows: swap(rows, 0, other, "label"))
    else:
        edit_table(root, name, change)
    with pytest.raises(ManifestError, match=message):
        FeatureDataset.open(root)
    assert name in {problem.name for problem in verify(root, "listing").problems}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil_digest, "its digest is not that of recipe, keys, objects and batch sizes"),
        (spoil_totals, "says num_ok 8"),
    ],
)
def test_opening_refuses_a_manifest_that_says_otherwise_than_the_tables(
    root: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_document(root / "manifest.json", change)
    with pytest.raises(ManifestError, match=message):
        FeatureDataset.open(root)
    assert {problem.name for problem in verify(root, "listing").problems} == {"manifest.json"}


@pytest.mark.parametrize("name", ["index.parquet", "shards.parquet", "listing.parquet"])
def test_opening_refuses_a_table_of_another_dataset(root: Path, tmp_path: Path, name: str) -> None:
    shard_format = "zarr" if (root / "data.zarr").exists() else "webdataset"
    other = tmp_path / "other"
    golden.write_shards(other, golden.Settings(format=shard_format, prefix="more/", salt=1, **EVEN | {"bad": ()}))
    shutil.copy(other / name, root / name)
    rename_files(root, name)
    with pytest.raises(ManifestError, match=rf"{name}|says size_bytes|its digest is not"):
        FeatureDataset.open(root)
    assert verify(root, "listing").problems


@pytest.mark.parametrize("field", ["key", "label", "status"])
def test_an_unfinished_dataset_is_refused_where_an_entry_was_exchanged_within(root: Path, field: str) -> None:
    (root / "manifest.json").unlink()
    opened = FeatureDataset.open(root, allow_incomplete=True)
    column = {"key": opened.columns.keys, "label": opened.columns.labels, "status": opened.columns.status}[field]
    one, other = next(
        (one, other)
        for one in range(8)
        for other in range(one)
        if one // 4 == other // 4 and column[one] != column[other]
    )
    name = root / f"commits/0000{one // 4}.json"
    edit_document(name, lambda entry: swap(entry["rows"], one % 4, other % 4, field))
    with pytest.raises(ManifestError, match=r"the listing says|is not zero"):
        FeatureDataset.open(root, allow_incomplete=True)


def test_an_unfinished_dataset_is_refused_where_entries_exchanged_their_objects(root: Path) -> None:
    (root / "manifest.json").unlink()
    one, other = (root / f"commits/0000{idx}.json" for idx in (0, 1))
    kept: list[Any] = []
    edit_document(one, lambda entry: kept.append(entry["objects"]))
    edit_document(other, lambda entry: (kept.append(entry["objects"]), entry.update(objects=kept[0])))
    edit_document(one, lambda entry: entry.update(objects=kept[1]))
    with pytest.raises(ManifestError, match=r"shard 0 has \w+ in '.*1.*', the plan implies"):
        FeatureDataset.open(root, allow_incomplete=True)
    assert {0, 1} <= {problem.shard for problem in verify(root, "listing").problems}
