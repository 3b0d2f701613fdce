"""Repair believes two witnesses against one, keeps what it replaces, and changes nothing where nobody can decide."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import IncompleteError, ManifestError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import Manifest
from parts import golden
from parts.reseal import edit_document, swap

FORMATS = ("zarr", "webdataset")
ENTRIES = tuple(f"commits/0000{shard_idx}.json" for shard_idx in range(4))
SETTINGS = {"num_rows": 7, "samples": 2}


def write(root: Path, shard_format: str, teacher: int = 0, prefix: str = "") -> Manifest:
    """Four shards of seven rows, by one of several teachers."""
    made = golden.write_shards(
        root, golden.Settings(format=shard_format, weights=f"{teacher:064x}", salt=teacher, prefix=prefix, **SETTINGS)
    )
    assert made is not None
    return made


@pytest.fixture(scope="module", params=FORMATS)
def datasets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Datasets of three teachers over the same rows, and one over other rows."""
    folder = tmp_path_factory.mktemp("repair")
    for teacher in range(3):
        write(folder / str(teacher), request.param, teacher)
    write(folder / "3", request.param, prefix="other/")
    for path in folder.iterdir():
        shutil.rmtree(path / "lock")
    return sorted(folder.iterdir())


@pytest.fixture
def root(datasets: list[Path], tmp_path: Path) -> Path:
    """A copy of the first."""
    return shutil.copytree(datasets[0], tmp_path / "features")


def content(root: Path) -> dict[str, bytes]:
    """All files but locks."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name != "lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def put(other: Path, root: Path, names: Sequence[str]) -> None:
    """Copy files of another dataset over those here."""
    for name in names:
        shutil.copy(other / name, root / name)


def shard_format_of(root: Path) -> str:
    return "zarr" if (root / "data.zarr").exists() else "webdataset"


def expect_restored(root: Path, truth: Path) -> None:
    """What extraction says and writes, run again, is what was there; all that was put aside is still there."""
    aside = {name: data for name, data in content(root).items() if ".rejected" in name}
    again = write(root, shard_format_of(root))
    assert again.digest == FeatureDataset.open(truth).manifest.digest  # type: ignore[union-attr]
    assert verify(root, "decode").problems == ()
    assert content(root).items() >= aside.items()
    objects = {name: data for name, data in content(truth).items() if name.startswith("data")}
    assert content(root).items() >= objects.items()


@pytest.mark.parametrize("other", [1, 3])
def test_a_stale_manifest_does_not_cost_a_healthy_plan_and_its_shards(
    root: Path, datasets: list[Path], other: int
) -> None:
    put(datasets[other], root, ["manifest.json"])
    before = content(root)
    (problem,) = [problem for problem in verify(root).problems if problem.name == "manifest.json"]
    assert problem.what == "is of another plan than plan.json and 4 of 4 entries"
    result = repair(root, stale_s=1)
    assert (result.shards, result.rewritten, result.kept) == ((), (), {"manifest.json": "manifest.json.rejected"})
    assert content(root) == {
        **{name: data for name, data in before.items() if name != "manifest.json"},
        "manifest.json.rejected": before["manifest.json"],
    }
    expect_restored(root, datasets[0])


def test_a_stale_plan_gives_way_to_manifest_and_entries_and_is_kept(root: Path, datasets: list[Path]) -> None:
    put(datasets[1], root, ["plan.json"])
    result = repair(root, stale_s=1)
    assert (result.shards, result.rewritten, result.left) == ((), ("plan.json",), ())
    expected = content(datasets[0]) | {"plan.json.rejected": (datasets[1] / "plan.json").read_bytes()}
    assert content(root) == expected
    FeatureDataset.open(root)


def test_a_stale_plan_and_listing_give_way_too(root: Path, datasets: list[Path]) -> None:
    put(datasets[3], root, ["plan.json", "listing.parquet"])
    result = repair(root, stale_s=1)
    assert (result.shards, result.rewritten) == ((), ("plan.json",))
    assert set(result.kept) == {"plan.json", "listing.parquet"}
    expect_restored(root, datasets[0])


def test_entries_of_another_dataset_are_put_aside_and_no_others(root: Path, datasets: list[Path]) -> None:
    put(datasets[1], root, [ENTRIES[1]])
    result = repair(root, stale_s=1)
    assert (result.shards, result.kept) == ((1,), {ENTRIES[1]: f"{ENTRIES[1]}.rejected"})
    expect_restored(root, datasets[0])


def test_all_entries_of_another_dataset_do_not_outvote_plan_and_manifest(root: Path, datasets: list[Path]) -> None:
    put(datasets[1], root, ENTRIES)
    assert repair(root, stale_s=1).shards == (0, 1, 2, 3)
    assert (root / "plan.json").read_bytes() == (datasets[0] / "plan.json").read_bytes()
    expect_restored(root, datasets[0])


def refused(root: Path, message: str) -> None:
    """Verification lists it, repair refuses it, and nothing is changed."""
    before, folders = content(root), sorted(path for path in root.iterdir() if path.is_dir())
    assert any("no two of these agree" in problem.what for problem in verify(root).problems)
    with pytest.raises(
        ManifestError, match=rf"no two of these agree: .*{message}.*; nothing was changed: put the right"
    ):
        repair(root, stale_s=1)
    assert content(root) == before
    assert sorted(path for path in root.iterdir() if path.is_dir()) == folders  # no lock either


def test_three_witnesses_that_all_disagree_change_nothing(root: Path, datasets: list[Path]) -> None:
    put(datasets[1], root, ["plan.json"])
    put(datasets[2], root, ["manifest.json"])
    refused(root, r"plan\.json is plan \w{12}, manifest\.json is of plan \w{12}, 4 entries of plan \w{12}")


def test_a_plan_against_a_manifest_without_entries_changes_nothing(root: Path, datasets: list[Path]) -> None:
    put(datasets[1], root, ["plan.json"])
    shutil.rmtree(root / "commits")
    refused(root, "there are no entries")


def test_halves_of_the_entries_are_no_majority(root: Path, datasets: list[Path]) -> None:
    put(datasets[1], root, ["plan.json", *ENTRIES[:2]])
    refused(root, "2 entries of plan \\w{12}, 2 entries of plan")


def test_a_lost_plan_is_not_made_of_a_manifest_that_the_entries_contradict(root: Path, datasets: list[Path]) -> None:
    put(datasets[1], root, ["manifest.json"])
    (root / "plan.json").unlink()
    refused(root, r"plan\.json cannot be read, manifest\.json is of plan")


def test_an_unfinished_dataset_with_entries_of_another_one_changes_nothing(root: Path, datasets: list[Path]) -> None:
    (root / "manifest.json").unlink()
    put(datasets[1], root, ENTRIES[:3])
    refused(root, r"plan\.json is plan \w{12}, 3 entries of plan \w{12}, 1 entries of plan")


@pytest.mark.parametrize(
    ("name", "other"),  # over the same rows, index and listing are the same
    [("index.parquet", 3), ("shards.parquet", 3), ("shards.parquet", 1), ("listing.parquet", 3)],
)
def test_a_table_of_another_dataset_costs_no_shard(root: Path, datasets: list[Path], name: str, other: int) -> None:
    put(datasets[other], root, [name])
    result = repair(root, stale_s=1)
    assert (result.shards, result.rewritten) == ((), ())
    assert result.kept == ({name: f"{name}.rejected"} if name == "listing.parquet" else {})
    with pytest.raises(IncompleteError):
        FeatureDataset.open(root)
    expect_restored(root, datasets[0])


@pytest.mark.parametrize("field", ["key", "label"])
def test_an_entry_with_other_keys_or_labels_than_the_listing_is_sent_back(
    root: Path, datasets: list[Path], field: str
) -> None:
    rows = FeatureDataset.open(root).columns
    values = {"key": rows.keys, "label": rows.labels}[field]
    shard_idx = next(idx for idx in range(3) if values[2 * idx] != values[2 * idx + 1])
    edit_document(root / ENTRIES[shard_idx], lambda entry: swap(entry["rows"], 0, 1, field))
    assert "the listing says" in verify(root, "listing").problems[0].what
    assert repair(root, "listing", stale_s=1).shards == (shard_idx,)
    expect_restored(root, datasets[0])


def test_what_is_put_aside_twice_is_kept_twice(root: Path, datasets: list[Path]) -> None:
    for other in (1, 2):
        put(datasets[other], root, ["manifest.json"])
        repair(root, stale_s=1)
    assert (root / "manifest.json.rejected").read_bytes() == (datasets[1] / "manifest.json").read_bytes()
    assert (root / "manifest.json.rejected.1").read_bytes() == (datasets[2] / "manifest.json").read_bytes()
    expect_restored(root, datasets[0])
