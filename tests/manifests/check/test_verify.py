"""What each level of verification sees, recomputation, and chunks that are intact but wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import ConfigError, InputError, LockHeldError
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.schema import Plan
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.lock import Lock
from parts import golden
from parts.damage import flip
from parts.datasets import write_features

FORMATS = ("zarr", "webdataset")


@pytest.fixture(params=FORMATS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Seven rows in shards of three, one bad."""
    golden.write_shards(tmp_path / "features", golden.Settings(format=request.param, num_rows=7, samples=3))
    return tmp_path / "features"


def teacher(error: float = 0.0) -> Callable[[np.ndarray, Sequence[str], int], dict[str, np.ndarray]]:
    """The true values again, in float32, times 1 + error."""

    def run(images: np.ndarray, keys: Sequence[str], batch_size: int) -> dict[str, np.ndarray]:
        assert images.shape == (len(keys), 4, 6, 3)
        true = {level.name: np.stack([golden.true_level(level, key) for key in keys]) for level in golden.LEVELS}
        return {name: values.astype(np.float32) * np.float32(1 + error) for name, values in true.items()}

    return run


def test_recomputing_the_same_gives_no_error(root: Path) -> None:
    report = verify(root, "recompute", teacher(), rows=4, tolerance=0)
    assert report.ok
    assert report.num_recomputed == 4
    assert report.max_relative_error == {"l2": 0.0, "l3": 0.0, "l4.b": 0.0}


def test_recomputing_states_the_relative_error_and_holds_the_tolerance(root: Path) -> None:
    report = verify(root, "recompute", teacher(0.01), rows=100, tolerance=0.02)
    assert report.ok
    assert report.num_recomputed == 6
    assert report.max_relative_error["l4.b"] == pytest.approx(0.01, rel=1e-4)
    assert report.max_relative_error["l2"] == pytest.approx(0.01, rel=0.1)  # float16 moves it by up to 2^-11
    strict = verify(root, "recompute", teacher(0.01), rows=100, tolerance=0.005)
    assert {problem.name for problem in strict.problems} == {"level l2", "level l3", "level l4.b"}
    assert "from the teacher's features, allowed is 0.005" in strict.problems[0].what


def test_recompute_needs_a_teacher_and_stored_images(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the teacher"):
        verify(root, "recompute")
    golden.write_shards(tmp_path / "bare", golden.Settings(images="joined"))
    with pytest.raises(ConfigError, match="stores no images"):
        verify(tmp_path / "bare", "recompute", teacher())


def test_recompute_says_what_it_lacks_before_it_reads_the_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden.write_shards(tmp_path, golden.Settings(images="joined"))
    monkeypatch.setattr(
        "dtpipe.manifests.check.verify.check_digests", lambda *_: pytest.fail("an hour of reading, for nothing")
    )
    for recompute in (None, teacher()):
        with pytest.raises(ConfigError, match=r"needs the teacher|stores no images"):
            verify(tmp_path, "recompute", recompute)


def test_objects_behind_a_link_to_another_disk_are_sound(root: Path, tmp_path: Path) -> None:
    folder = next(path for path in (root / "data", root / "data.zarr") if path.exists())
    moved = folder.rename(tmp_path / "another-disk")
    folder.symlink_to(moved, target_is_directory=True)
    assert verify(root).problems == ()
    assert repair(root, stale_s=1).shards == ()


def test_repair_reads_the_objects_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("dtpipe.manifests.check.verify.check_digests", lambda *_: seen.append(1))
    repair(root, stale_s=1)
    assert seen == [1]


def test_levels_see_more_and_more(root: Path) -> None:
    path = max(
        (path for path in root.rglob("*") if path.is_file() and "data" in str(path.relative_to(root))),
        key=lambda p: p.stat().st_size,
    )
    flip(path)
    if "zarr.json" not in path.name:
        assert verify(root, "listing").ok
        assert [problem.name for problem in verify(root, "digest").problems] == [path.relative_to(root).as_posix()]


@pytest.mark.parametrize("shard_format", FORMATS)
def test_decode_finds_values_that_should_never_have_been_written(shard_format: str, tmp_path: Path) -> None:
    settings = golden.Settings(format=shard_format)

    def spoiled(plan: Plan, listing: Listing, shard_idx: int) -> ShardArrays:
        shard = golden.shard_arrays(plan, listing, shard_idx, settings)
        for idx, row in enumerate(shard.rows):
            if row.status != "ok":
                shard.arrays["image"][idx] = 7
            elif row.key == "cat/2.png":
                shard.arrays["l3"][idx, 1, 0, 0, 0] = np.nan
        return shard

    write_features(tmp_path, golden.make_recipe(settings), golden.make_listing(settings), spoiled)
    assert verify(tmp_path, "digest").ok
    report = verify(tmp_path, "decode")
    assert sorted(problem.what.split(" (")[0] for problem in report.problems) == [
        "image of sample 'dog/3.png'",
        "l3 of sample 'cat/2.png'",
    ]
    assert len(repair(tmp_path, "decode", stale_s=1).shards) == len({problem.shard for problem in report.problems})


def test_an_unfinished_dataset_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    golden.write_shards(tmp_path, golden.Settings(num_rows=7, samples=3), limit=2, do_merge=False)
    report = verify(tmp_path, "decode")
    assert report.ok
    assert (report.complete, report.num_shards, report.num_shards_missing) == (False, 2, 1)


def test_strays_are_told_and_are_no_problem(root: Path) -> None:
    (root / "data.old").write_bytes(b"x")
    report = verify(root, "decode")
    assert report.ok
    assert report.strays == ("data.old",)


def test_repair_waits_for_nobody_and_touches_nothing_while_somebody_writes(root: Path) -> None:
    with Lock.acquire(Store(root), stale_s=60), pytest.raises(LockHeldError):
        repair(root, stale_s=60)


def test_wrong_urls_and_levels_are_refused(tmp_path: Path, root: Path) -> None:
    with pytest.raises(InputError, match="no feature dataset"):
        verify(tmp_path / "none")
    with pytest.raises(InputError, match="no feature dataset"):
        repair(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="choose one of listing, digest, decode, recompute"):
        verify(root, "all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stored bytes"):
        repair(root, "recompute")


def test_a_coarse_codec_is_allowed_what_it_states_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbols are whole numbers: a teacher that differs by a thousandth moves some of them by one."""
    cast = "dtpipe.manifests.codecs.cast.CastLevel"
    monkeypatch.setattr(f"{cast}.encode", lambda codec, features: {"": np.rint(features).astype(codec.level.dtype)})
    monkeypatch.setattr(f"{cast}.error", lambda _, parts: np.full(parts[""].shape[:-3], 0.5))
    golden.write_shards(tmp_path, golden.Settings())
    report = verify(tmp_path, "recompute", teacher(0.001), rows=9, tolerance=0)
    assert report.ok
    assert set(report.max_relative_error.values()) == {0.0}
    assert not verify(tmp_path, "recompute", teacher(0.5), rows=9, tolerance=0.01).ok
