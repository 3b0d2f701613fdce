"""Nobody computes with symbols: all that reads stored levels sees x, where a dataset stores 3 - 2x.

Each claim compares with a dataset of the same features under `cast`. Symbols would show: whitening turns 3 - 2x into
-W(x), so losses, maps and pictures would be those of other targets, and recomputed features would be far off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.data import STORED, StoredData
from dtpipe.distill.stream.decode import DECODERS
from dtpipe.distill.trainer import train
from dtpipe.manifests.codecs.base import SYMBOLS
from dtpipe.manifests.fidelity import CODEC_ERROR, Fidelity
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset, JoinedDataset
from dtpipe.manifests.read.source import FeatureSource, read_images
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.live.teacher import open_live
from dtpipe.pipeline.plan.extraction import plan_extraction
from dtpipe.pipeline.report.inspect import describe_dataset, render_sample
from dtpipe.pipeline.report.maps.features import RunFeatures, pca_pairs
from parts.codecs import register_turned
from parts.extractions import Extract, MakeConfig
from parts.images import write_images
from parts.memory import tiny_config

Pair = Callable[..., tuple[FeatureDataset, FeatureDataset]]
STEP = 1e-5
"""3 - 2x and back rounds in float32: features of the tiny teacher are below 20, where a step is 2e-6."""


@pytest.fixture
def turned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codec is known, with an encoder and a decoder on the device unless a test is run with False."""
    register_turned(monkeypatch, on_device=getattr(request, "param", True))


BOTH_WAYS = pytest.mark.parametrize("turned", [True, False], ids=["device", "reference"], indirect=True)


@pytest.fixture
def pair(extract: Extract, turned: None) -> Pair:
    """Two datasets of equal features and settings, under `cast` and under the codec."""

    def make(name: str = "", form: str = "zarr", dtype: str = "float32", **changes: Any) -> Any:
        shard = {"samples": 3, "format": form, "dtype": dtype}
        urls = (
            extract(f"cast{name}", shard=shard, **changes),
            extract(f"turned{name}", shard=shard, codec={"name": "turned"}, **changes),
        )
        return tuple(FeatureDataset.open(url) for url in urls)

    return make


def features(source: FeatureSource, view: int = 0) -> dict[str, np.ndarray]:
    """All good rows in the order of their keys. Shapes: -> {level: [N, C, h, w]}."""
    rows = sorted(source.columns.ok_rows, key=lambda row: source.columns.keys[row])
    return source.read(rows, [level.name for level in source.levels], [view] * len(rows), images=False)[1].decode()


def assert_close(found: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> None:
    assert found.keys() == true.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, true[name], rtol=0, atol=STEP)


def losses(out: Path, *datasets: FeatureDataset, **changes: Any) -> list[float]:
    """Of six steps."""
    urls = tuple(dataset.url for dataset in datasets)
    config = tiny_config(out, datasets=urls, epochs=3, batch_size=4, micro_batch=None, log_every=1, **changes)
    train(config, StoredData(partial(open_live, {})) if config.reencode else STORED)
    return [line["loss"] for line in read_metrics(out)]


def command(*args: object) -> Any:
    """What a command says on stdout with --json."""
    result = CliRunner().invoke(main, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@BOTH_WAYS
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_symbols_are_stored_and_features_are_read(form: str, pair: Pair) -> None:
    plain, coded = pair(form=form)
    of_plain = {"zarr": "dtpipe-features/2", "webdataset": "dtpipe-features/1"}[form]  # the latter has no uncompressed
    assert (plain.plan.format, coded.plan.format) == (of_plain, "dtpipe-features/2")
    assert_close(features(coded), features(plain))
    np.testing.assert_array_equal(read_images(coded, range(8)), read_images(plain, range(8)))
    if form == "zarr":  # where any zarr reader sees the symbols
        stored, true = (zarr.open_group(f"{dataset.url}/data.zarr", mode="r") for dataset in (coded, plain))
        np.testing.assert_array_equal(stored["l2"][:], 3 - 2 * true["l2"][:])
        np.testing.assert_array_equal(stored["l2_three"][:], np.full((8, 1), 3))


@BOTH_WAYS
def test_training_takes_the_steps_that_plain_features_give(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, coded = pair()
    expected = losses(tmp_path / "plain", plain)
    assert losses(tmp_path / "coded", coded) == pytest.approx(expected, rel=1e-4)
    live = losses(tmp_path / "plain live", plain, reencode=0.5)
    assert losses(tmp_path / "live", coded, reencode=0.5) == pytest.approx(live, rel=1e-4)
    monkeypatch.setitem(DECODERS, "turned", lambda codec, parts: parts[SYMBOLS])  # training on symbols would be seen
    symbols = losses(tmp_path / "symbols", coded)
    assert min(abs(one / other - 1) for one, other in zip(symbols, expected, strict=True)) > 0.005


def test_joined_with_plain_datasets_each_view_and_row_is_decoded_by_its_own_codec(
    pair: Pair, extract: Extract, other_ddpm: Path, tmp_path: Path
) -> None:
    plain, coded = pair()
    late = FeatureDataset.open(extract("late", shard={"samples": 4, "dtype": "float32"}, noise={"timesteps": [300]}))
    joined, expected = JoinedDataset([coded, late]), JoinedDataset([plain, late])
    assert joined.along_views
    for view in (0, 1):
        assert_close(features(joined, view), features(expected, view))
    mixed = losses(tmp_path / "mixed", coded, late, join=True)
    assert mixed == pytest.approx(losses(tmp_path / "plain", plain, late, join=True), rel=1e-4)
    beside = extract("beside", shard={"samples": 3, "dtype": "float32"}, teacher={"path": str(other_ddpm)})
    assert_close(*(features(JoinedDataset([FeatureDataset.open(beside), dataset])) for dataset in (coded, plain)))
    others = write_images(tmp_path / "others", classes=("bird", "fish"))
    more = FeatureDataset.open(extract("more", images=str(others), shard={"samples": 3, "dtype": "float32"}))
    assert_close(features(ConcatDataset([more, coded])), features(ConcatDataset([more, plain])))


def test_a_float16_level_comes_back_as_one(pair: Pair) -> None:
    plain, coded = pair(dtype="float16", form="webdataset")
    for name, values in features(coded).items():
        assert values.dtype == np.float16
        np.testing.assert_allclose(values, features(plain)[name], rtol=2**-10)


def test_what_is_shown_of_a_dataset_is_of_its_features(pair: Pair, tmp_path: Path) -> None:
    plain, coded = pair()
    key = plain.columns.keys[0]
    pictures = [
        render_sample(dataset.url, key, tmp_path / f"{idx}.png").read_bytes()
        for idx, dataset in enumerate((plain, coded))
    ]
    assert pictures[0] == pictures[1]
    described = describe_dataset(coded.url)
    assert {(level["codec"], level["role"]) for level in described["levels"]} == {("turned", "features")}
    assert [level["raw_bytes"] for level in described["levels"]] == [
        level["raw_bytes"] for level in describe_dataset(plain.url)["levels"]
    ]
    parts = [described["images"], *described["levels"]]
    assert sum(part["size_bytes"] for part in parts) + described["overhead_bytes"] == described["totals"]["size_bytes"]


def test_what_a_codec_loses_is_measured_as_it_is_written_and_shown(
    extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the features that a second extraction, under float32 `cast`, stores."""
    changes = {"batch_size": 1, "noise": {"timesteps": [50], "flips": True}}
    coarse = FeatureDataset.open(extract("int8", shard={"samples": 3}, codec={"name": "int8"}, **changes))
    exact = FeatureDataset.open(extract("exact", shard={"samples": 3, "dtype": "float32"}, **changes))
    assert coarse.manifest is not None
    assert exact.manifest is not None
    assert CODEC_ERROR not in exact.manifest.provenance
    measured = coarse.manifest.provenance[CODEC_ERROR]
    first = [row for row in (0, 3, 6) for _ in range(2)]  # one row of each shard, both views
    for level in coarse.recipe.levels:
        true, decoded = (
            source.read(first, [level.name], [0, 1] * 3, images=False)[1].decode()[level.name]
            for source in (exact, coarse)
        )
        assert measured[level.name] == pytest.approx(Fidelity.of(true, decoded).record(), rel=1e-3)
        assert 0 < measured[level.name]["relative_mse"] < 1e-3
    described = {level["name"]: level for level in command("inspect", coarse.url)["levels"]}
    assert described["l2"]["codec_error"] == measured["l2"]
    assert described["l2"]["expected"] is None
    shown = CliRunner().invoke(main, ["inspect", coarse.url]).output
    assert re.search(r"level +codec +bytes expected +error expected +measured +worst +cosine +attention +of\n", shown)
    assert re.search(r"l2 +int8 +- +- +\d\.\de-05 +\d\.\de-05 +1\.0000 +0\.00\d+ +6\n", shown), shown


def test_a_plan_counts_what_the_codec_stores(turned: None, make_config: MakeConfig, tmp_path: Path) -> None:
    plain, coded = (
        plan_extraction(
            make_config(shard={"samples": 3, "dtype": "float32", "image_coding": "plain"}, codec={"name": codec})
        )
        for codec in ("cast", "turned")
    )
    assert coded.levels == {name: size + (0 if name == "image" else 4) for name, size in plain.levels.items()}
    assert 0.9 < coded.stored_bytes / plain.stored_bytes < 1.5


def test_verification_recomputes_features_and_measures_flips(pair: Pair) -> None:
    plain, coded = (command("verify", dataset.url, "--level", "recompute", "--device", "cpu") for dataset in pair())
    assert coded["ok"] and coded["num_recomputed"] == 8
    assert max(coded["max_relative_error"].values()) < 1e-6
    assert coded["flip_error"] == plain["flip_error"] != {}


def test_report_and_evaluation_of_a_run_are_those_of_plain_features(
    pair: Pair, image_folder: Path, tmp_path: Path
) -> None:
    shown, scores = [], []
    for dataset in pair():
        run = tmp_path / f"run-{Path(dataset.url).name}"
        losses(run, dataset)
        config = DistillConfig.model_validate(tiny_config(run, datasets=(dataset.url,)).model_dump())
        features = RunFeatures.open(run, config)
        shown.append(features.see(features.choose(4, seed=0)))
        scores.append(command("eval", run, "knn", "--images", image_folder, "--device", "cpu"))
    assert shown[1].errors() == pytest.approx(shown[0].errors(), rel=1e-4)
    pictures = [pca_pairs(seen) for seen in shown]
    for name, pairs in pictures[0].items():
        for (plain, _), (coded, _) in zip(pairs, pictures[1][name], strict=True):
            assert np.abs(plain.astype(int) - coded).max() <= 1  # the teacher's picture
    assert scores[0]["scores"] == scores[1]["scores"]
