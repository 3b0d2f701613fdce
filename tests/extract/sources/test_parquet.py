"""Parquet files in the layout of Hugging Face datasets, and near it; columns are found, or the user is asked."""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtpipe.extract.sources.images import decode_image
from dtpipe.extract.sources.parquet.groups import GroupCache
from dtpipe.extract.sources.parquet.source import ParquetSource
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.write.listing import permutation
from parts.packing import contents, labels, no_fault_of_the_image, write_parquet
from parts.paths import FIXTURES

FILES = {f"{name}.png": name.encode() * 50 for name in ("b", "a", "ä", "c", "d", "e", "f")}


def write(path: Path, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return path


def images(*data: bytes | None, field: str = "bytes") -> pa.Array:
    return pa.array([None if each is None else {field: each} for each in data], pa.struct({field: pa.binary()}))


def test_file_written_by_hugging_face_datasets() -> None:
    """See the fixture's README."""
    source = open_source(str(FIXTURES / "sources" / "imagefolder.parquet"))
    assert labels(source) == {f"{idx}.png": "cat" if idx % 2 else "dog" for idx in (1, 3, 5, 0, 2, 4)}
    for key, data in contents(source).items():
        rng = np.random.Generator(np.random.Philox(int(key.removesuffix(".png"))))
        np.testing.assert_array_equal(decode_image(data, 64), rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


def test_paths_are_keys_in_the_order_of_the_file(tmp_path: Path) -> None:
    source = open_source(str(write_parquet(tmp_path / "a.parquet", FILES)))
    assert source.kind == "parquet"
    assert list(contents(source).items()) == list(FILES.items())
    assert source.ignored() == {}


def test_labels_have_the_names_of_the_schema(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", FILES, [0, 1, 1, -1, 0, 0, 1], ["cat", "dog"])
    assert list(labels(open_source(str(path))).values()) == ["cat", "dog", "dog", None, "cat", "cat", "dog"]
    with pytest.raises(InputError, match=r"a\.parquet row 2: label 2 is not among the 2 names of column label"):
        open_source(str(write_parquet(path, FILES, [0, 1, 2, 0, 0, 0, 0], ["cat", "dog"]))).list()


@pytest.mark.parametrize(
    ("columns", "features", "expected"),
    [
        ({"label": ["x", None]}, {}, ["x", None]),
        ({"labels": [3, 4]}, {}, ["3", "4"]),
        ({"label": pa.array(["x", "y"]).dictionary_encode()}, {}, ["x", "y"]),
        ({"breed": [0, 1]}, {"breed": {"_type": "ClassLabel", "names": ["pug", "owl"]}}, ["pug", "owl"]),
        (
            {"fine": [0, 1], "coarse": [0, 0]},
            {name: {"_type": "ClassLabel", "names": ["p", "q"]} for name in ("fine", "coarse")},
            [None] * 2,
        ),
        ({"label": [1.0, None]}, {}, ["1", None]),
        ({"label": pa.array([1, None], pa.int8())}, {}, ["1", None]),
        ({"label": [True, False]}, {}, ["True", "False"]),
        ({"label": pa.array([Decimal("3.00"), None])}, {}, ["3", None]),
        ({"label": pa.array(["x", "y"], pa.large_string())}, {}, ["x", "y"]),
        ({"label": pa.array(["x", "y"], pa.string_view())}, {}, ["x", "y"]),
        ({"label": pa.array([2.0, 2.0]).dictionary_encode()}, {}, ["2", "2"]),
        ({"label": pa.nulls(2)}, {}, [None, None]),
        ({"breed": [1.0, None]}, {"breed": {"_type": "ClassLabel", "names": ["pug", "owl"]}}, ["owl", None]),
        ({"label": [[1], [2]], "breed": ["x", "y"]}, {"breed": {"_type": "ClassLabel"}}, ["x", "y"]),
        ({"caption": ["x", "y"]}, {}, [None, None]),
        ({"label": [0, 1]}, None, ["0", "1"]),
    ],
)
def test_label_columns(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any] | None, expected: list[str | None]
) -> None:
    metadata = {"huggingface": "not json" if features is None else json.dumps({"info": {"features": features}})}
    path = write(tmp_path / "a.parquet", metadata, image=images(b"1", b"2"), **columns)
    assert list(labels(open_source(str(path))).values()) == expected


CLASS_LABEL = {"_type": "ClassLabel", "names": ["p", "q"]}
WHEN = datetime.datetime(2020, 1, 1)


@pytest.mark.parametrize(
    ("columns", "features", "lost"),
    [
        ({"label": [0.5, 1.0]}, {}, {"labels of the column of labels that are no whole numbers": 2}),
        ({"label": [float("inf"), float("nan")]}, {}, {"labels of the column of labels that are no whole numbers": 1}),
        ({"label": [Decimal("0.5"), None]}, {}, {"labels of the column of labels that are no whole numbers": 1}),
        ({"label": [[1], [2]]}, {}, {"labels of column label (list<element: int64>)": 2}),
        ({"label": [{"id": 1}, None]}, {}, {"labels of column label (struct<id: int64>)": 2}),
        ({"labels": [WHEN, None]}, {}, {"labels of column labels (timestamp[us])": 2}),
        ({"label": [WHEN.date(), None]}, {}, {"labels of column label (date32[day])": 2}),
        (
            {"fine": [0, 1], "coarse": [0, 0]},
            {"fine": CLASS_LABEL, "coarse": CLASS_LABEL},
            {"labels of one of the columns fine, coarse: rename one to label": 2},
        ),
        ({"caption": ["x", "y"]}, {}, {}),
    ],
)
def test_labels_that_are_no_classes_are_counted(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any], lost: dict[str, int]
) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    source = open_source(str(write(tmp_path / "a.parquet", metadata, image=images(b"1", b"2"), **columns)))
    assert set(labels(source).values()) == {None}
    assert source.ignored() == lost


def test_one_fraction_in_any_file_makes_all_floats_no_classes(tmp_path: Path) -> None:
    """A file may hold whole numbers by chance; half of the rows with a class and half without would be a trap."""
    for name, values in (("a", [1.0, 2.0]), ("b", [0.5, 3.0])):
        write(tmp_path / f"{name}.parquet", {}, image=images(b"1", b"2"), label=values)
    source = open_source(str(tmp_path))
    assert set(labels(source).values()) == {None}
    assert source.ignored() == {"labels of the column of labels that are no whole numbers": 4}


def test_rows_are_keys_where_paths_are_not_unique(tmp_path: Path) -> None:
    for name in ("b", "a/a"):
        write_parquet(tmp_path / f"{name}.parquet", {"1.png": b"1", "2.png": name.encode()})
    (tmp_path / "README.md").write_text("")
    source = open_source(str(tmp_path))
    assert contents(source) == {
        "a/a.parquet#0": b"1",
        "a/a.parquet#1": b"a/a",
        "b.parquet#0": b"1",
        "b.parquet#1": b"b",
    }
    assert source.ignored() == {".md": 1}
    some_null = pa.array([{"bytes": b"1", "path": "1.png"}, {"bytes": b"2", "path": None}])
    assert list(contents(open_source(str(write(tmp_path / "c.parquet", image=some_null))))) == [
        "c.parquet#0",
        "c.parquet#1",
    ]


def test_pattern_takes_one_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", {f"{split}.png": b"x"})
    assert list(contents(open_source(f"{tmp_path}/data/train-*.parquet"))) == ["train.png"]
    assert len(open_source(str(tmp_path / "data")).list()) == 2
    assert len(open_source(str(tmp_path), "parquet").list()) == 2
    with pytest.raises(
        InputError, match=r"no image in it \(2 \.parquet\); name a \.parquet file itself, or the folder right above"
    ):
        open_source(str(tmp_path)).list()


@pytest.mark.parametrize(
    "columns",
    [
        {"jpg": pa.array([b"x"])},
        {"anything": pa.array([b"x"], pa.large_binary())},
        {"photo": images(b"x"), "thumbnail": pa.array([b"no"])},
        {"mask": images(b"no"), "image": images(b"x")},
        {"image.of.it": pa.array([b"x"])},
        {"img": pa.array([{"path": "1.png", "bytes": b"x", "more": 1}])},
    ],
)
def test_image_column_is_found(tmp_path: Path, columns: dict[str, pa.Array]) -> None:
    assert list(contents(open_source(str(write(tmp_path / "a.parquet", **columns)))).values()) == [b"x"]


def test_image_column_that_is_not_clear_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="columns before, after could all be the images; rename the right one to `image`"
    ):
        open_source(str(write(tmp_path / "a.parquet", before=images(b"x"), after=images(b"y")))).list()
    with pytest.raises(InputError, match=r"no column of images, only text \(string\), label \(int64\)"):
        open_source(str(write(tmp_path / "b.parquet", text=["x"], label=[1]))).list()


def test_null_images_are_bad_and_images_elsewhere_are_refused(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", image=images(b"x", None))))
    first, second = source.list()
    assert source.read(first.uri) == b"x"
    with pytest.raises(BadImage, match="the row has no bytes"):
        source.read(second.uri)
    outside = pa.array([{"bytes": None, "path": "/data/1.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    with pytest.raises(InputError, match=r"image\.bytes is empty, .*with the images embedded"):
        open_source(str(write(tmp_path / "b.parquet", image=outside))).list()


def test_damage_is_refused_at_listing_or_bad_when_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", FILES)
    whole, source = path.read_bytes(), open_source(str(path))
    uris = [item.uri for item in source.list()]
    for damaged in (whole[:100], whole[:-3], b"", whole[:-200] + bytes(200), b"not Parquet at all"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.parquet: is no whole Parquet file .*fetch or write it again"):
            open_source(str(path)).list()
    start = pq.read_metadata(pa.BufferReader(whole)).row_group(1).column(0).dictionary_page_offset
    path.write_bytes(whole[:start] + bytes(60) + whole[start + 60 :])
    source = open_source(str(path), "parquet")
    assert source.read(uris[0]) == FILES["b.png"]
    with pytest.raises(BadImage, match="its row group, 1, cannot be decoded"):
        source.read(uris[3])
    assert source.read(uris[6]) == FILES["f.png"]


def test_file_that_is_gone_is_no_fault_of_the_image(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", FILES)
    uri = open_source(str(path)).list()[-1].uri
    path.unlink()
    with no_fault_of_the_image(r"No such file.*run again"):
        open_source(str(path), "parquet").read(uri)
    write_parquet(path, {"1.png": b"x"})
    for source in (open_source(str(path), "parquet"), open_source(str(path))):
        with pytest.raises(InputError, match="changed since it was listed"):
            source.read(uri)
    with pytest.raises(InputError, match="changed since it was listed"):
        open_source(str(path)).read(f"{path}#0,1")


def test_row_groups_too_large_to_decode_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"1.png": np.random.default_rng(0).bytes(20_000)})
    monkeypatch.setattr("dtpipe.extract.sources.parquet.bounded.MAX_GROUP_BYTES", 10_000)
    with pytest.raises(InputError, match=r"a\.parquet: row group 0 holds .* write the file with row groups of at most"):
        open_source(str(path)).list()


@pytest.mark.parametrize("name", ["", "/a.parquet", "/*.parquet"])
def test_object_store_gives_the_same(upload: Callable[..., str], name: str, tmp_path: Path) -> None:
    source = open_source(upload({"a.parquet": write_parquet(tmp_path / "a.parquet", FILES).read_bytes()}) + name)
    assert source.kind == "parquet"
    assert contents(source) == FILES


def test_threads_decode_each_group_once(tmp_path: Path) -> None:
    files = {f"{idx}.png": bytes([idx]) * 3000 for idx in range(200)}
    source = open_source(str(write_parquet(tmp_path / "a.parquet", files, group=10)))
    assert isinstance(source, ParquetSource)
    items = source.list()
    with ThreadPoolExecutor(16) as pool:
        assert [files[item.key] for item in items] == list(pool.map(source.read, [item.uri for item in items]))
    assert source._groups.num_decoded == 20


def test_container_order_decodes_groups_once_and_permuted_order_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the README says of order: with room for 4 of 20 groups."""
    monkeypatch.setattr("dtpipe.extract.sources.parquet.source.CACHE_BYTES", 4 * 10 * 3100)
    path = write_parquet(tmp_path / "a.parquet", {f"{idx}.png": bytes([idx]) * 3000 for idx in range(200)}, group=10)
    decoded = {}
    for order in (range(200), permutation(200, 0)):
        source = ParquetSource(str(path))
        uris = [item.uri for item in source.list()]
        for row in order:
            source.read(uris[row])
        decoded[isinstance(order, range)] = source._groups.num_decoded
    assert decoded[True] == 20
    assert decoded[False] > 100


def test_cache_waits_for_another_threads_decoding_and_forgets_failures() -> None:
    began: Counter[int] = Counter()
    lock = threading.Lock()

    def decode(name: tuple[str, int]) -> np.ndarray:
        with lock:
            began[name[1]] += 1
        time.sleep(0.01)
        if name[1] == 5 and began[5] == 1:
            raise InputError("the store did not answer")
        return np.full(100, name[1], np.uint8)

    cache = GroupCache(decode, max_bytes=300)
    with ThreadPoolExecutor(8) as pool:
        assert [int(found[0]) for found in pool.map(cache.get, [("a", idx // 8) for idx in range(40)])] == [
            idx // 8 for idx in range(40)
        ]
    assert set(began.values()) == {1}
    with pytest.raises(InputError, match="did not answer"):
        cache.get(("a", 5))
    assert int(cache.get(("a", 5))[0]) == 5
    cache.get(("a", 4))
    cache.get(("a", 3))
    assert (began[4], began[3]) == (1, 1)  # still kept
    cache.get(("a", 0))
    assert began[0] == 2  # forgotten long ago
