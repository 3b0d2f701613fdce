"""Symbols under rans in both stores: their bytes are those of the coder, and plain readers find and decode them."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.codecs.base import SYMBOLS, encode_level
from dtpipe.manifests.codecs.fitted import HeldFitted
from dtpipe.manifests.codecs.rans import compress, decompress
from dtpipe.manifests.codecs.rans_tables import fit_tables, tables_from_json, tables_to_json
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.codecs.transform import TransformLevel
from dtpipe.manifests.errors import ConfigError, DamagedDataError
from dtpipe.manifests.read.dataset import FeatureDataset
from parts import golden
from parts.fits import fit_levels
from parts.paths import REPO
from parts.zarr_readers import register_entry_points

LEVELS, FILES = fit_levels(golden.LEVELS)
NUM_ROWS = 7


def settings(shard_format: str) -> golden.Settings:
    return golden.Settings(shard_format, NUM_ROWS, 3, levels=LEVELS, fitted=FILES)


def codec_of(idx: int) -> TransformLevel:
    codec = open_codec(LEVELS[idx], HeldFitted(FILES))
    assert isinstance(codec, TransformLevel)
    return codec


def true_symbols(idx: int, key: str, ok: bool) -> np.ndarray:
    """By the codec's reference. Shapes: -> [V, n]."""
    codec = codec_of(idx)
    return encode_level(codec, golden.true_level(LEVELS[idx], key))[SYMBOLS] * np.int8(ok)


@pytest.fixture
def dataset(tmp_path: Path) -> FeatureDataset:
    golden.write_shards(tmp_path / "features", settings("zarr"))
    return FeatureDataset.open(tmp_path / "features")


def test_zarr_python_reads_the_symbols_by_the_entry_point_and_nothing_but_the_array(dataset: FeatureDataset) -> None:
    register_entry_points()
    for idx, level in enumerate(LEVELS):
        stored = np.asarray(zarr.open_array(f"{dataset.url}/data.zarr/{level.name}", mode="r")[:])
        for row, (key, status) in enumerate(zip(dataset.columns.keys, dataset.columns.status, strict=True)):
            np.testing.assert_array_equal(stored[row], true_symbols(idx, key, status == "ok"))


def test_zarr_python_writes_the_bytes_that_we_write(dataset: FeatureDataset, tmp_path: Path) -> None:
    register_entry_points()
    ours = Path(dataset.url) / "data.zarr/l2"
    document = json.loads((ours / "zarr.json").read_text())
    again = tmp_path / "again"
    again.mkdir()
    (again / "zarr.json").write_text(json.dumps(document))
    zarr.open_array(str(again), mode="r+")[0:3] = zarr.open_array(str(ours), mode="r")[0:3]
    symbols = np.asarray(zarr.open_array(str(again), mode="r")[:3])
    np.testing.assert_array_equal(symbols, zarr.open_array(str(ours), mode="r")[:3])
    theirs = (again / "c/0/0/0").read_bytes()
    for chunk in symbols.reshape(6, -1):
        assert compress(chunk, codec_of(0).load_tables()) in theirs


def test_rans_takes_fewer_bytes_than_zstd_of_the_same_symbols(tmp_path: Path) -> None:
    """Levels too small for either, so of larger ones; the tables' own bytes count."""
    level = golden.LEVELS[0].model_copy(update={"channels": 12, "height": 8, "width": 8})
    sizes, decoded = {}, {}
    for shard_format in ("zarr", "webdataset"):
        for coder in ("zstd", "rans"):
            levels, files = fit_levels((level,), coder, 0.1)  # type: ignore[arg-type]
            made = golden.Settings(shard_format, 60, 30, levels=levels, fitted=files, bad=())
            root = tmp_path / f"{shard_format}-{coder}"
            golden.write_shards(root, made)
            dataset = FeatureDataset.open(root)
            rows = dataset.columns.ok_rows
            decoded[shard_format, coder] = dataset.read(rows, ("l2",), np.zeros_like(rows))[1].decode()["l2"]
            stored = [*root.glob("data/*.tar"), *root.glob("data.zarr/l2/**/*")]
            sizes[shard_format, coder] = sum(path.stat().st_size for path in stored if path.is_file())
        assert sizes[shard_format, "rans"] < sizes[shard_format, "zstd"]
    for values in decoded.values():
        np.testing.assert_array_equal(values, decoded["zarr", "zstd"])


def test_the_code_of_the_formats_page_gives_the_symbols_back() -> None:
    page = (REPO / "manifests" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def symbols.*?)```", page, re.DOTALL)
    scope: dict[str, Any] = {"np": np}
    exec(code, scope)
    rng = np.random.default_rng(0)
    values = np.clip(np.rint(rng.laplace(0, np.linspace(20, 0.05, 4200), (3, 4200))), -128, 127).astype(np.int8)
    tables = fit_tables(values, (np.arange(4200) // 600).astype(np.uint8), 7)
    assert tables.lanes == 2
    for row in values:
        found = scope["symbols"](compress(row, tables), tables.frequencies, tables.classes)
        np.testing.assert_array_equal(found, row)


def test_another_reader_without_our_codec_refuses_the_array_and_reads_the_others(dataset: FeatureDataset) -> None:
    tensorstore = pytest.importorskip("tensorstore")

    def read(array: str) -> Any:
        kvstore = {"driver": "file", "path": f"{dataset.url}/data.zarr/{array}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()

    with pytest.raises(ValueError, match=r"dtpipe\.rans"):
        read("l2")
    assert read("l2_norm").shape == (NUM_ROWS, 2, 3)


def test_plain_webdataset_finds_the_coded_bytes_as_members(tmp_path: Path) -> None:
    golden.write_shards(tmp_path, settings("webdataset"))
    dataset = FeatureDataset.open(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset's own, on import and on few shards
        import webdataset

        urls = [str(path) for path in sorted((tmp_path / "data").glob("*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == NUM_ROWS
    for row, sample in enumerate(samples):
        truth = true_symbols(0, dataset.columns.keys[row], dataset.columns.status[row] == "ok")
        chunks = [sample[f"l2.v{view}.rans"] for view in range(2)]
        np.testing.assert_array_equal(decompress(chunks, codec_of(0).load_tables()), truth)
        assert sample["l2_norm.v0.npy"].shape == (3,)


def test_tables_of_the_metadata_are_those_of_the_fit_and_lost_ones_are_written_again(dataset: FeatureDataset) -> None:
    document = Path(dataset.url) / "data.zarr/l3/zarr.json"
    whole = document.read_bytes()
    inner = json.loads(whole)["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["dtpipe.rans", "crc32c"]
    tables, true = tables_from_json(inner[0]["configuration"]), codec_of(1).load_tables()
    np.testing.assert_array_equal(tables.frequencies, true.frequencies)
    np.testing.assert_array_equal(tables.classes, true.classes)
    document.unlink()
    (Path(dataset.url) / "manifest.json").unlink()  # nothing else says what the document was
    assert {problem.mend for problem in verify(dataset.url, "decode").problems} == {"merge", "rewrite"}
    assert repair(dataset.url, stale_s=1).rewritten == ("data.zarr/l3/zarr.json",)
    assert document.read_bytes() == whole


def test_metadata_whose_tables_are_lost_waits_for_the_next_fit(dataset: FeatureDataset) -> None:
    root = Path(dataset.url)
    (root / "data.zarr/l3/zarr.json").write_text("{}")
    for path in (root / "codecs").iterdir():
        path.unlink()
    problems = {(problem.name.partition("/")[0], problem.mend) for problem in verify(root, "decode").problems}
    assert problems == {("codecs", "fit"), ("data.zarr", "rewrite")}
    repair(root, stale_s=1)
    golden.write_shards(root, settings("zarr"))  # which fits again and writes what follows
    assert verify(root, "decode").problems == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"frequencies": "no base64!"},
        {"frequencies": "AAAA"},
        {"counts": [3]},
        {"counts": "many"},
        {"counts": [-1] * 200},
        {"counts": None},
    ],
)
def test_a_configuration_that_holds_no_tables_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rans"):
        tables_from_json({**tables_to_json(codec_of(0).load_tables()), **changes})


def test_bytes_of_other_tables_are_named_as_such(dataset: FeatureDataset) -> None:
    register_entry_points()
    with pytest.raises(DamagedDataError, match="not what rans makes"):
        decompress([b"\0" * 9], codec_of(0).load_tables())
