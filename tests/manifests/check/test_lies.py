"""Sealed documents that say impossible things: verification names them, and never fails or leaves the dataset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtpipe.manifests.canonical import seal
from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import DtpipeError, ManifestError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.store.local import LocalFiles
from parts import golden
from parts.reseal import edit_document

FORMATS = ("zarr", "webdataset")
DOCUMENTS = ("commits/00000.json", "commits/00001.json", "manifest.json", "plan.json")


@pytest.fixture(scope="module", params=FORMATS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, one bad row."""
    root = tmp_path_factory.mktemp("lies") / "features"
    golden.write_shards(root, golden.golden_settings(request.param))
    shutil.rmtree(root / "lock")
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(whole, tmp_path / "features")


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of all objects that are asked for."""
    names: list[str] = []
    for method, of in (("read", lambda name: [name]), ("stat", lambda name: [name]), ("read_ranges", _names)):
        true = getattr(LocalFiles, method)

        def noted(self: LocalFiles, asked: Any, true: Any = true, of: Any = of) -> Any:
            names.extend(of(asked))
            return true(self, asked)

        monkeypatch.setattr(LocalFiles, method, noted)
    return names


def _names(ranges: list[tuple[str, int, int]]) -> list[str]:
    return [name for name, _, _ in ranges]


def objects(**changes: object) -> Callable[[dict[str, Any]], object]:
    """Change the first object of an entry."""
    return lambda entry: entry["objects"][0].update(changes)


def chunks(field: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Change the first chunk of each array of the first object."""

    def change(entry: dict[str, Any]) -> None:
        for members in entry["objects"][0]["arrays"].values():
            members[field][0] = value

    return change


def rows(**changes: object) -> Callable[[dict[str, Any]], object]:
    """Change the first row of an entry."""
    return lambda entry: entry["rows"][0].update(changes)


def nest(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name above the dataset": objects(name="../outside"),
    "a name beside it": objects(name="data/../../outside"),
    "an absolute name": objects(name="/etc/passwd"),
    "a name with NUL": objects(name="data\0/x"),
    "an empty name": objects(name=""),
    "a name too long for a disk": objects(name="x" * 5000),
    "the name of another file of the dataset": objects(name="plan.json"),
    "a huge size": objects(size_bytes=10**30),
    "a size of 2^62": objects(size_bytes=2**62),
    "a size below zero": objects(size_bytes=-1),
    "a size too small for its chunks": objects(size_bytes=3),
    "no objects": lambda entry: entry.update(objects=[]),
    "objects of another kind": lambda entry: entry.update(objects={}),
    "no arrays": objects(arrays={}),
    "an array too many": lambda entry: entry["objects"][0]["arrays"].update(
        l9={"offset": [], "size": [], "crc32c": []}
    ),
    "an object twice": lambda entry: entry["objects"].append(entry["objects"][0]),
    "no chunks": objects(arrays={"l2": {"offset": [], "size": [], "crc32c": []}}),
    "a chunk far away": chunks("offset", 2**62),
    "a chunk before the first byte": chunks("offset", -5),
    "a chunk of 10^30 bytes": chunks("size", 10**30),
    "a chunk of 2^52 bytes": chunks("size", 2**52),
    "chunks that overlap": chunks("size", 1200),
    "a checksum of 33 bits": chunks("crc32c", 2**32),
    "fewer sizes than offsets": chunks("size", [1]),
    "no rows": lambda entry: entry.update(rows=[]),
    "a huge row": rows(row=10**30),
    "a row below zero": rows(row=-1),
    "a row of another shard": rows(shard=7),
    "an image of 10^30 px": rows(original_height=10**30),
    "a status of its own": rows(status="fine"),
    "a key of the wrong type": rows(key=7),
    "another key": rows(key="other.png"),
    "another label": rows(label="other"),
    "another shard": lambda entry: entry.update(shard=10**30),
    "a deep provenance": lambda entry: entry.update(provenance={"deep": nest(400)}),
    "another plan": lambda entry: entry.update(plan_blake3="f" * 64),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_entry_that_lies_is_named_and_sent_back(root: Path, touched: list[str], lie: str) -> None:
    edit_document(root / "commits/00001.json", LIES[lie])
    problems = verify(root, "decode").problems
    deep = lie == "a deep provenance"  # odd, and yet no lie
    assert deep or any((problem.name, problem.shard) == ("commits/00001.json", 1) for problem in problems), problems
    assert not [name for name in touched if name.startswith("/") or ".." in name or "\0" in name or not name]
    try:
        FeatureDataset.open(root)  # which does not look at entries
        FeatureDataset.open(root, allow_incomplete=True)
        (root / "manifest.json").rename(root / "manifest.aside")
        opened = FeatureDataset.open(root, allow_incomplete=True)
        assert deep
        read_level(opened, "l2", 2)
    except ManifestError as err:
        assert "00001.json" in str(err) or "commits/" in str(err)
    (root / "manifest.aside").rename(root / "manifest.json")
    if not deep:
        assert repair(root, stale_s=1).shards == (1,)


def test_an_empty_entry_a_folder_and_a_loop_in_the_place_of_files_are_named(root: Path) -> None:
    (root / "commits/00000.json").write_bytes(b"")
    (root / "commits/00001.json").unlink()
    (root / "commits/00001.json").symlink_to("00001.json")
    (root / "shards.parquet").unlink()
    (root / "shards.parquet").mkdir()
    (root / "index.parquet").write_bytes(b"")
    names = {problem.name for problem in verify(root, "decode").problems}
    assert names >= {"commits/00000.json", "commits/00001.json", "shards.parquet", "index.parquet"}


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "listing.parquet"])
def test_a_loop_in_the_place_of_any_file_is_a_problem_and_no_crash(root: Path, name: str) -> None:
    (root / name).unlink()
    (root / name).symlink_to(name)
    assert name in {problem.name for problem in verify(root, "decode").problems}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("plan.json", {"num_rows": 10**15, "num_shards": 10**15 // 2}),
        ("plan.json", {"num_rows": 2**31, "num_shards": 2**30}),
        ("plan.json", {"num_rows": 10**30}),
        ("plan.json", {"num_rows": 0}),
        ("manifest.json", {"totals": {}}),
        ("manifest.json", {"files": {}}),
        ("manifest.json", {"files": {"../../etc/passwd": {"size_bytes": 1, "blake3": "0" * 64}}}),
        ("manifest.json", {"provenance": {"plan": nest(400)}}),
        ("manifest.json", {"complete": "yes?"}),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_plan_or_manifest_that_lies_is_named(root: Path, name: str, change: dict[str, Any], alone: bool) -> None:
    """With `alone`, nothing else is there to contradict it."""
    edit_document(root / name, lambda document: document.update(change))
    if alone:
        (root / "listing.parquet").unlink()
        (root / "manifest.json" if name == "plan.json" else root / "plan.json").unlink()
    problems = verify(root, "decode").problems
    assert problems
    if not alone:
        assert name in {problem.name for problem in problems}


ODD = st.sampled_from(
    [10**30, -(10**30), 2**62, 2**63, 2**31, -1, 0, 1e308, "..", "../x", "\0", "/etc", "", None, True]
)
VALUES = st.recursive(
    ODD | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc./", max_size=3), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a document."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [found for name, inner in items for found in [(*path, name), *places(inner, (*path, name))]]


def mutate(document: dict[str, Any], data: st.DataObject) -> None:
    """Replace, remove or add one thing anywhere."""
    path = data.draw(st.sampled_from(places(document)))
    holder: Any = document
    for name in path[:-1]:
        holder = holder[name]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove":
        del holder[path[-1]]
    elif action == "add" and isinstance(holder, list):
        holder.append(data.draw(VALUES))
    else:
        holder[path[-1] if action == "replace" else data.draw(st.text("ab", max_size=2))] = data.draw(VALUES)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_a_document_says_verification_ends_with_problems(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = shutil.copytree(whole, tmp_path_factory.mktemp("mutated") / "features")
    for name in data.draw(st.lists(st.sampled_from(DOCUMENTS), min_size=1, max_size=2)):
        document = json.loads((root / name).read_bytes())
        document.pop("checksum", None)
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(document, data)
        document.pop("checksum", None)
        (root / name).write_bytes(seal(document))
    if data.draw(st.booleans()):
        (root / data.draw(st.sampled_from(["manifest.json", "plan.json", "listing.parquet", "index.parquet"]))).unlink()
    try:
        for problem in verify(root, "decode").problems:
            assert problem.what
    except DtpipeError as err:
        assert str(err)
    for incomplete in (False, True):
        try:
            opened = FeatureDataset.open(root, allow_incomplete=incomplete)
            read_level(opened, opened.levels[0].name, int(opened.columns.ok_rows[0]))
        except (DtpipeError, IndexError):  # no ok row
            continue
    if data.draw(st.integers(0, 9)) == 0:
        try:
            repair(root, stale_s=1)
        except DtpipeError as err:
            assert str(err)
