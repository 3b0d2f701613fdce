"""What happens to a stored file is an error where a reader touches it, and a problem in `verify`; repair mends it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.codecs.registry import CODECS
from dtpipe.manifests.errors import DamagedDataError, IncompleteError
from dtpipe.manifests.read import chunks
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import load_entry
from dtpipe.manifests.write.plan import load_plan, plan_digest
from parts import codecs, golden
from parts.damage import flip, flipped
from parts.fits import fit_levels

FORMATS = ("zarr", "webdataset")
READ_ON_OPEN = {"manifest.json", "plan.json", "listing.parquet", "index.parquet", "shards.parquet"}


CODED = tuple(f"{shard_format} {coder}" for shard_format in FORMATS for coder in ("fitted", "rans"))
"""Datasets whose levels lie under a codec that was fitted, and of these whose symbols are under fitted tables, too."""


@pytest.fixture(autouse=True)
def codecs_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, codecs.FITTED_CODEC.name, codecs.FITTED_CODEC)


@pytest.fixture(params=[*FORMATS, *CODED])
def settings(request: pytest.FixtureRequest) -> golden.Settings:
    """Of a small dataset of two shards."""
    shard_format, _, fitted = request.param.partition(" ")
    plain = golden.golden_settings(shard_format)
    if not fitted:
        return plain
    levels, files = codecs.fit_scales(golden.LEVELS) if fitted == "fitted" else fit_levels(golden.LEVELS[:2])
    return replace(plain, levels=levels, fitted=files)


@pytest.fixture(autouse=True)
def compiled_from_the_first_chunk_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where much is read; what it does not find as expected is read chunk by chunk."""
    monkeypatch.setattr(chunks, "NATIVE_FROM", 0)


@pytest.fixture
def dataset(settings: golden.Settings, tmp_path: Path) -> Path:
    """The dataset, without locks."""
    root = tmp_path / "features"
    golden.write_shards(root, settings)
    shutil.rmtree(root / "lock")
    return root


def files_of(root: Path) -> list[str]:
    """Names of all files."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def hit_files(root: Path, settings: golden.Settings) -> list[str]:
    """All but locks; of a coded dataset those that others have not."""
    named = [name for name in files_of(root) if not name.startswith("lock")]
    rans = settings.levels[0].codec.name == "transform"
    own = ("codecs/", "data/", "data.zarr/l2/") if rans else ("codecs/", "plan")
    return [name for name in named if not settings.fitted or name.startswith(own)]


def touched_bytes(root: Path) -> dict[str, set[int]]:
    """Object name to the offsets that reading all ok rows must look at."""
    store = Store(root)
    plan = load_plan(store)
    trailer = 4 if plan.recipe.shard.format == "zarr" else 0
    touched: dict[str, set[int]] = {}
    for shard_idx in range(plan.num_shards):
        entry = load_entry(store, plan, plan_digest(store), shard_idx)
        for stored in entry.objects:
            for array, members in stored.arrays.items():
                views = len(members.offset) // len(entry.rows)
                for chunk, (offset, size) in enumerate(zip(members.offset, members.size, strict=True)):
                    if entry.rows[chunk // views].status == "ok" and array != "key":
                        touched.setdefault(stored.name, set()).update(range(offset, offset + size + trailer))
    return touched


def read_all(root: Path) -> list[np.ndarray]:
    """Every image and every view of every level of all ok rows."""
    opened = FeatureDataset.open(root)
    names = [level.name for level in opened.levels]
    arrays = []
    for view in range(len(opened.views)):
        images, coded = opened.read(opened.columns.ok_rows, names, [view] * len(opened.columns.ok_rows))
        arrays += [images, *coded.decode().values()]
    return arrays


def damages(data: bytes) -> Iterator[tuple[str, bytes | None, set[int]]]:
    """A word, the damaged bytes (None: deleted) and the offsets that changed or are gone."""
    places = sorted({0, len(data) // 3, 2 * len(data) // 3, len(data) - 1})
    for place in places:
        yield f"flip at {place}", flipped(data, place, 0x10), {place}
    for length in (0, len(data) - 1):
        yield f"cut to {length}", data[:length], set(range(length, len(data)))
    yield "deleted", None, set(range(len(data)))
    yield "longer", data + b"x", set()


def test_every_damage_to_every_file_is_found_by_verify_and_by_readers_that_touch_it(
    dataset: Path, settings: golden.Settings
) -> None:
    truth, touched = read_all(dataset), touched_bytes(dataset)
    seen = 0
    for name in hit_files(dataset, settings):
        path = dataset / name
        whole = path.read_bytes()
        for what, data, changed in damages(whole):
            path.unlink() if data is None else path.write_bytes(data)
            problems = verify(dataset, "digest").problems
            assert any(problem.name == name and problem.what for problem in problems), f"{name} {what}: {problems}"
            if name in READ_ON_OPEN or name.startswith("codecs/") or changed & touched.get(name, set()):
                expected = IncompleteError if (name, what) == ("manifest.json", "deleted") else DamagedDataError
                with pytest.raises(expected) as caught:
                    read_all(dataset)
                assert expected is IncompleteError or name in str(caught.value), f"{name} {what}: {caught.value}"
            else:
                assert all(np.array_equal(*pair) for pair in zip(truth, read_all(dataset), strict=True)), (
                    f"{name} {what}"
                )
            seen += 1
        path.write_bytes(whole)
    assert verify(dataset, "decode").problems == ()
    assert seen == 8 * len(hit_files(dataset, settings))


def test_error_of_a_flipped_byte_names_shard_level_sample_and_object(dataset: Path) -> None:
    store = Store(dataset)
    entry = load_entry(store, load_plan(store), plan_digest(store), 1)
    stored = next(each for each in entry.objects if "l3" in each.arrays)
    flip(dataset / stored.name, stored.arrays["l3"].offset[1] + 5)
    opened = FeatureDataset.open(dataset)
    key = opened.columns.keys[2]
    read_level(opened, "l3", 2, 0)
    with pytest.raises(
        DamagedDataError, match=rf"{re.escape(stored.name)}: level l3 of sample '{key}' \(shard 1, row 2, view 1"
    ):
        read_level(opened, "l3", 2, 1)
    with pytest.raises(DamagedDataError, match=r"level l3 of sample .* view 1"):
        opened.read([1, 2], ["l2", "l3"], [0, 1])


def swap(one: Path, other: Path) -> None:
    """Exchange the contents of two files."""
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.fixture
def even(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two shards of equal size, so that only content tells them apart."""
    root = tmp_path / "even"
    golden.write_shards(root, golden.Settings(format=request.param, num_rows=4, samples=2, bad=()))
    return root


@pytest.mark.parametrize("even", FORMATS, indirect=True)
def test_swapped_shards_are_found(even: Path) -> None:
    if (even / "data").exists():
        swap(even / "data/00000.tar", even / "data/00001.tar")
    else:
        swap(even / "data.zarr/l2/c/0/0/0/0/0", even / "data.zarr/l2/c/1/0/0/0/0")
    opened = FeatureDataset.open(even)
    for row in range(4):
        with pytest.raises(DamagedDataError, match=rf"level l2 of sample '{opened.columns.keys[row]}'"):
            read_level(opened, "l2", row)
    assert {problem.shard for problem in verify(even).problems} == {0, 1}


@pytest.mark.parametrize("even", ["zarr"], indirect=True)
def test_swapped_levels_are_found(even: Path) -> None:
    swap(even / "data.zarr/l2/c/0/0/0/0/0", even / "data.zarr/l3/c/0/0/0/0/0")
    opened = FeatureDataset.open(even)
    for level in ("l2", "l3"):
        with pytest.raises(DamagedDataError, match=f"level {level} of sample"):
            read_level(opened, level, 0)
    read_level(opened, "l4.b", 0)
    assert {problem.name for problem in verify(even).problems} == {
        "data.zarr/l2/c/0/0/0/0/0",
        "data.zarr/l3/c/0/0/0/0/0",
    }


@pytest.mark.parametrize("even", ["webdataset"], indirect=True)
def test_swapped_levels_inside_a_tar_are_found(even: Path) -> None:
    store = Store(even)
    arrays = load_entry(store, load_plan(store), plan_digest(store), 0).objects[0].arrays
    data = bytearray((even / "data/00000.tar").read_bytes())
    one, other, size = arrays["l2"].offset[0], arrays["l3"].offset[0], arrays["l2"].size[0]
    assert size == arrays["l3"].size[0]
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    (even / "data/00000.tar").write_bytes(data)
    with pytest.raises(DamagedDataError, match="level l2 of sample"):
        read_level(FeatureDataset.open(even), "l2", 0)


@pytest.mark.parametrize("shard_format", FORMATS)
def test_stale_objects_and_stale_metadata_are_found(shard_format: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for root, salt in ((old, 0), (new, 1)):
        golden.write_shards(root, golden.Settings(format=shard_format, salt=salt, weights=f"{salt:064x}"))
    names = [
        name
        for name in files_of(new)
        if not name.startswith("lock") and (old / name).read_bytes() != (new / name).read_bytes()
    ]
    assert {"manifest.json", "plan.json", "shards.parquet"} <= set(names)
    for name in names:
        whole = (new / name).read_bytes()
        (new / name).write_bytes((old / name).read_bytes())
        assert verify(new).problems, name
        if name in READ_ON_OPEN or name.startswith("data"):
            with pytest.raises(DamagedDataError):
                read_all(new)
        (new / name).write_bytes(whole)
    assert verify(new).problems == ()


def test_repair_and_extract_restore_the_identical_dataset_after_any_damage(
    dataset: Path, settings: golden.Settings
) -> None:
    before = FeatureDataset.open(dataset).manifest
    assert before is not None
    content = {name: (dataset / name).read_bytes() for name in files_of(dataset) if name.startswith("data")}
    for idx, name in enumerate(hit_files(dataset, settings)):
        path = dataset / name
        path.unlink() if idx % 3 == 0 else flip(path, bits=4)
        result = repair(dataset, stale_s=1)
        assert len(result.shards) == (
            1 if name.startswith("commits") or (name in content and "zarr.json" not in name) else 0
        ), name
        if not name.endswith("zarr.json") and name not in ("plan.json", "manifest.json"):
            with pytest.raises(IncompleteError):
                FeatureDataset.open(dataset)
        after = golden.write_shards(dataset, settings)
        assert after.digest == before.digest, name
        assert verify(dataset, "decode").problems == (), name
        assert {name: (dataset / name).read_bytes() for name in content} == content


def test_repair_of_a_sound_dataset_changes_nothing(dataset: Path) -> None:
    before = {name: (dataset / name).read_bytes() for name in files_of(dataset)}
    result = repair(dataset, stale_s=1)
    assert (result.shards, result.rewritten, result.left) == ((), (), ())
    after = {name: (dataset / name).read_bytes() for name in files_of(dataset) if not name.startswith("lock")}
    assert after == before


def test_repair_keeps_other_shards_and_deletes_nothing(dataset: Path) -> None:
    name = next(name for name in files_of(dataset) if re.fullmatch(r"data/00001\.tar|data\.zarr/l3/c/1/.*", name))
    (dataset / name).write_bytes(b"other")
    kept = (dataset / "commits/00000.json").read_bytes()
    rejected = (dataset / "commits/00001.json").read_bytes()
    assert repair(dataset, stale_s=1).shards == (1,)
    assert (dataset / "commits/00000.json").read_bytes() == kept
    assert (dataset / "commits/00001.json.rejected").read_bytes() == rejected
    partial = FeatureDataset.open(dataset, allow_incomplete=True)
    assert partial.columns.status[2] == "missing"
    with pytest.raises(IncompleteError, match="not written yet"):
        read_level(partial, "l2", 2)
    read_level(partial, "l2", int(partial.columns.ok_rows[0]))


def test_a_damaged_lock_is_named_and_mended(dataset: Path) -> None:
    repair(dataset, stale_s=1)
    (lock,) = (dataset / "lock").iterdir()
    flip(lock, 20)
    assert [problem.name for problem in verify(dataset).problems] == [f"lock/{lock.name}"]
    assert repair(dataset, stale_s=0.2).rewritten == (f"lock/{lock.name}",)
    assert verify(dataset).problems == ()
    FeatureDataset.open(dataset)
