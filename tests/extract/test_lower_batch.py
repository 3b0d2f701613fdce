"""A batch that did not fit memory: what is said, and shards that are left in smaller batches, each with its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from dtpipe.extract.device import go_on_with_less
from dtpipe.extract.run import run_extraction
from dtpipe.extract.shards.queue import ShardQueue
from dtpipe.extract.tally import ExtractResult
from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import VerifyReport, verify
from dtpipe.manifests.errors import (
    ConfigError,
    DeviceMemoryError,
    ManifestError,
    PlanChangedError,
    saying_what_to_lower,
)
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import BatchRange
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import committed_shards, load_entry, load_manifest
from dtpipe.manifests.write.plan import load_plan, plan_digest
from dtpipe.pipeline.live.recompute import Recomputation
from dtpipe.pipeline.report.inspect import describe_dataset
from parts.damage import flip
from parts.extractions import MakeConfig
from parts.marking import LEVEL, Marks, write_marks
from parts.reseal import edit_document
from parts.stored import stored_level

Run = Callable[..., ExtractResult]
LOWERED = (BatchRange(batch_size=2, first=2, last=3),)


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Extract eight images in four shards, in batches of 4 if nothing else is said; `room` as in `Marks`."""
    teacher = write_marks(tmp_path)

    def extract(*room: int, **changes: Any) -> ExtractResult:
        monkeypatch.setattr(Marks, "room", list(room))
        fields = {"teacher": teacher, "shard": {"samples": 2}, "batch_size": 4, "retries": 0}
        return run_extraction(make_config(**{**fields, **changes}))

    return extract


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "features"


@pytest.fixture
def lowered(run: Run, root: Path) -> str:
    """A dataset whose last two shards were made in batches of 2; its digest."""
    with pytest.raises(DeviceMemoryError):
        run(4, 4, 2)
    return run(2, lower_batch_to=2).digest


def made_in(root: Path) -> list[float]:
    """In how large a batch each row was made, as its features say."""
    return [float(value) for value in stored_level(FeatureDataset.open(root), LEVEL, range(8))[:, 0, 0, 0, 0]]


def recomputed(root: Path) -> VerifyReport:
    return verify(root, "recompute", Recomputation(str(root), None, "cpu"), tolerance=0)


def test_a_batch_without_room_says_what_to_lower_and_keeps_what_is_whole(run: Run, root: Path) -> None:
    said = (
        r"^shard [23]: cpu has no memory for 4 images at once \(.*can't allocate memory.*\); all committed shards "
        "stay: run the same command again with --lower-batch-to 2, which"
    )
    with pytest.raises(DeviceMemoryError, match=said):
        run(4, 4, 2)
    store = Store(root)
    assert committed_shards(store, load_plan(store)) == [0, 1]


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_shards_that_are_left_say_their_batch_size_in_entries_manifest_and_digest(
    form: str, run: Run, root: Path
) -> None:
    shard = {"samples": 2, "format": form}
    with pytest.raises(DeviceMemoryError):
        run(4, 4, 2, shard=shard)
    result = run(2, shard=shard, lower_batch_to=2)
    assert result.shards_written == 2
    assert made_in(root) == [4, 4, 4, 4, 2, 2, 2, 2]
    store, manifest = Store(root), load_manifest(Store(root))
    plan, plan_blake3 = load_plan(store), plan_digest(store)
    entries = [load_entry(store, plan, plan_blake3, shard_idx) for shard_idx in range(4)]
    assert [entry.batch_size for entry in entries] == [None, None, 2, 2]
    assert manifest.batch_sizes == LOWERED
    objects = [
        {"name": stored.name, "size": stored.size_bytes, "blake3": stored.blake3}
        for entry in entries
        for stored in entry.objects
    ]
    document = {
        "format": plan.format,
        "recipe": plan.recipe.model_dump(mode="json"),
        "keys": list(FeatureDataset.open(root).columns.keys),
        "objects": sorted(objects, key=lambda listed: str(listed["name"])),
        "batch_sizes": [{"batch_size": 2, "first": 2, "last": 3}],
    }
    assert manifest.digest == result.digest == blake3(canonical_json(document)).hexdigest()
    assert describe_dataset(str(root))["batch_sizes"] == document["batch_sizes"]


def test_each_row_is_recomputed_in_batches_of_its_own_size(
    lowered: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceMemoryError, match=r"recomputing: cpu has no memory for 4 images at once .*--device cpu"):
        recomputed(root)
    monkeypatch.setattr(Marks, "room", [4])
    report = recomputed(root)
    assert (report.ok, report.num_recomputed, report.max_relative_error) == (True, 8, {LEVEL: 0.0})


def test_nothing_is_said_where_all_shards_have_the_planned_size(run: Run, root: Path) -> None:
    run(4)
    spoil_objects(root, 0)
    repair(root)
    run(4, lower_batch_to=4)
    assert b"batch_sizes" not in (root / "manifest.json").read_bytes()
    assert not any(b'"batch_size"' in path.read_bytes() for path in (root / "commits").iterdir())


def spoil_objects(root: Path, shard_idx: int) -> None:
    flip(root / "data.zarr" / LEVEL / "c" / str(shard_idx) / "0" / "0" / "0" / "0")


def spoil_entry(root: Path, shard_idx: int) -> None:
    flip(root / "commits" / f"{shard_idx:05d}.json")


@pytest.mark.parametrize("spoil", [spoil_objects, spoil_entry])
def test_a_repaired_shard_is_made_again_in_batches_of_its_own_size(
    spoil: Callable[[Path, int], None], lowered: str, run: Run, root: Path
) -> None:
    for shard_idx in (1, 3):
        spoil(root, shard_idx)
    assert repair(root).shards == (1, 3)
    again = run(4)
    assert (again.shards_written, again.digest) == (2, lowered)
    assert made_in(root) == [4, 4, 4, 4, 2, 2, 2, 2]


def test_a_shard_that_is_repaired_twice_is_made_as_it_was_last(lowered: str, run: Run, root: Path) -> None:
    spoil_objects(root, 3)
    repair(root)
    run(1, lower_batch_to=1)
    assert load_manifest(Store(root)).batch_sizes == (
        BatchRange(batch_size=2, first=2, last=2),
        BatchRange(batch_size=1, first=3, last=3),
    )
    spoil_objects(root, 3)
    repair(root)
    run(4)
    assert made_in(root) == [4, 4, 4, 4, 2, 2, 1, 1]


def test_smaller_batches_are_refused_where_nothing_is_left_to_lower(run: Run, root: Path) -> None:
    with pytest.raises(ConfigError, match="holds no dataset yet whose shards could be left; give --batch-size 2"):
        run(4, lower_batch_to=2)
    assert not root.exists()
    run(4)
    with pytest.raises(ConfigError, match=r"--lower-batch-to is 8, and .* was begun with batches of 4; give less"):
        run(4, lower_batch_to=8)
    with pytest.raises(PlanChangedError, match=r"batch_size: 4 -> 2.*give --lower-batch-to 2"):
        run(4, batch_size=2)
    with pytest.raises(PlanChangedError, match=r"batch_size: 4 -> 8.*set them back, or choose another --out"):
        run(4, batch_size=8)


def test_batch_sizes_that_are_not_those_of_the_entries_are_found(lowered: str, root: Path) -> None:
    wrong = {"batch_sizes": [{"batch_size": 2, "first": 1, "last": 3}]}
    edit_document(root / "manifest.json", lambda document: document.update(wrong))
    with pytest.raises(ManifestError, match="its digest is not that of recipe, keys, objects and batch sizes"):
        FeatureDataset.open(root)
    whats = [problem.what for problem in verify(root, "listing").problems]
    assert "says other batch sizes than the entries in commits/" in whats
    repair(root)
    edit_document(root / "commits" / "00000.json", lambda document: document.update(batch_size=4))
    assert [
        problem.shard for problem in verify(root, "listing").problems if "not below the recipe's" in problem.what
    ] == [0]


def test_memory_that_failed_on_every_try_ends_the_run_and_other_faults_keep_their_name() -> None:
    queue = ShardQueue([0], retries=1)
    task = queue.take()
    assert task is not None
    full = DeviceMemoryError("no room")
    assert queue.fail(task, full)  # another process may have taken it for a while
    with pytest.raises(DeviceMemoryError, match="no room"):
        queue.fail(task, full)
    with pytest.raises(RuntimeError, match="shapes"), saying_what_to_lower("shard 0", "cpu", 4, "-"):
        raise RuntimeError("shapes do not fit")
    said = pytest.raises(
        DeviceMemoryError, match=r"cuda has no memory for 1 image at once .* where more memory is free"
    )
    with said, saying_what_to_lower("shard 0", "cuda", 1, go_on_with_less(1)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
