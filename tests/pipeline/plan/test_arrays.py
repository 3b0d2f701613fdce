"""What a plan says of bytes is what an extraction writes; what it assumes is said to be assumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dtpipe.extract.run import run_extraction
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import CodecRecipe
from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.plan.arrays import (
    ASSUMED_BY_STAGE,
    ArrayPlan,
    assume_codec,
    assumed_error,
    assumed_ratio,
    assumed_stage,
    print_arrays,
)
from dtpipe.pipeline.plan.extraction import plan_extraction
from dtpipe.pipeline.plan.training import bytes_read_per_sample
from dtpipe.pipeline.report.inspect import describe_dataset
from parts import golden
from parts.extractions import MakeConfig

PLANS = (
    ArrayPlan("image", "exact", 200, 100.0, 100.0, None),
    ArrayPlan("l2", "cast", 4000, 3600.0, 1800.0, 0.0),
    ArrayPlan("l3", "cast", 1000, 900.0, 450.0, 0.0),
)


@pytest.mark.parametrize(("form", "samples"), [("zarr", 8), ("zarr", 4096), ("zarr", 3), ("webdataset", 3)])
def test_a_plan_that_saw_every_image_says_the_bytes_that_are_written(
    form: str, samples: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        out=str(tmp_path / form), shard={"samples": samples, "format": form}, batch_size=8, noise={"flips": True}
    )
    plan = plan_extraction(config)
    result = run_extraction(config)
    arrays = {array.name: array for array in plan.arrays}
    assert plan.stored_bytes - round(8 * arrays.pop("files").stored_bytes) == pytest.approx(result.size_bytes, abs=1)
    written = sum(path.stat().st_size for path in Path(result.url).rglob("*") if path.is_file())
    assert plan.stored_bytes == pytest.approx(written, abs=8000)  # records and entries of these few rows
    described = describe_dataset(result.url)
    written = {"image": described["images"], **{level["name"]: level for level in described["levels"]}}
    assert {name: array.stored_bytes * 8 for name, array in arrays.items() if name != "headers"} == {
        name: parts["size_bytes"] for name, parts in written.items()
    }
    assert {name: array.raw_bytes * 8 for name, array in arrays.items() if name != "headers"} == {
        name: parts["raw_bytes"] for name, parts in written.items()
    }
    assert arrays["headers"].stored_bytes * 8 == pytest.approx(described["overhead_bytes"])
    assert all((array.error or 0) < 1e-6 for array in plan.arrays)  # float16 rounds
    dataset = FeatureDataset.open(result.url)
    one_view = written["image"]["size_bytes"] / 8 + written["l2"]["size_bytes"] / 16
    assert bytes_read_per_sample([dataset], ["l2"], joined=False) == pytest.approx(one_view)
    assert arrays["image"].read_bytes + arrays["l2"].read_bytes == pytest.approx(one_view)
    assert bytes_read_per_sample([dataset, dataset], ["l2"], joined=False) == pytest.approx(one_view)
    twice = written["image"]["size_bytes"] / 8 + 2 * written["l2"]["size_bytes"] / 32  # four views, of which one
    assert bytes_read_per_sample([dataset, dataset], ["l2"], joined=True) == pytest.approx(twice)


def test_a_codec_that_loses_something_says_how_much_before_and_after(make_config: MakeConfig) -> None:
    plan = plan_extraction(make_config(shard={"samples": 8}, codec={"name": "int8"}, batch_size=8))
    levels = {array.name: array for array in plan.arrays if array.codec == "int8"}
    assert set(levels) == {"l2", "l3"}
    assert all(1e-7 < (array.error or 0) < 1e-3 for array in levels.values())
    assert all(array.raw_bytes / array.stored_bytes > 1.2 for array in levels.values())


def test_before_a_fit_ratio_and_error_are_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    codecs = {"l2": "transform", "l3": "transform"}
    coded = assume_codec(PLANS, codecs, 0.03, None, 1000)
    assert [(plan.codec, plan.assumed) for plan in coded] == [
        ("exact", None),
        ("transform", "zstd 3"),
        ("transform", "zstd 3"),
    ]
    assert coded[1].stored_bytes == pytest.approx(4000 / 7.63)
    assert coded[1].read_bytes == pytest.approx(4000 / 7.63 / 2)
    assert coded[1].error == 0.03
    within = assume_codec(PLANS, codecs, None, round(1000 * (100 + 5000 / 10.84)), 1000)
    assert sum(plan.stored_bytes for plan in within) == pytest.approx(100 + 5000 / 10.84)
    assert within[2].error == pytest.approx(0.06, rel=1e-3)
    print_arrays(Console(), coded, 1000, 2, 32)
    shown = capsys.readouterr().out
    assert (
        "stored and error of l2, l3 are ASSUMED, as measured on all levels of the demo's teacher (64 px, zstd 3)"
        in shown
    )
    print_arrays(Console(), PLANS, 1000, 1, 32)
    assert "ASSUMED" not in capsys.readouterr().out


def test_draws_are_told_how_far_they_lie_apart(make_config: MakeConfig) -> None:
    several = make_config(noise={"draws": 3, "timesteps": [100, 500]}, batch_size=8)
    apart = {array.name: array.apart for array in plan_extraction(several).arrays}
    assert apart.pop("image") is None and apart.pop("headers") is None and apart.pop("files") is None
    dataset = FeatureDataset.open(run_extraction(several).url)
    views = {(view.timestep, view.draw): idx for idx, view in enumerate(dataset.recipe.views)}
    for name, share in apart.items():
        rows = [[read_level(dataset, name, row, view) for view in views.values()] for row in range(8)]
        white = np.array(rows, np.float64)  # [n, V, C, h, w]
        white -= white.mean(axis=(2, 3, 4), keepdims=True)
        white /= np.sqrt(white.var(axis=(2, 3, 4), keepdims=True) + 1e-5)
        pairs = [(views[t, draw], views[t, draw + 1]) for t in (100, 500) for draw in (0, 1)]
        distances = [np.square(white[:, one] - white[:, other]).mean() for one, other in pairs]
        assert share == pytest.approx(np.mean(distances) / 2, rel=1e-2)  # stored features are rounded
    single = make_config(noise={"flips": True, "timesteps": [100, 500]})
    assert all(array.apart is None for array in plan_extraction(single).arrays)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ((0.0, 0.0), None),
        ((0.03, 0.03), "codecs lose more than that of l3: more draws of these say little new"),
        ((0.2, 0.2), "codecs lose more than that of l2, l3: more draws of these say little new"),
    ],
)
def test_draws_that_a_codec_drowns_are_named(
    errors: tuple[float, float], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    image, *levels = PLANS
    known = zip(levels, errors, (0.1, 0.01), strict=True)
    print_arrays(
        Console(), [image, *(replace(plan, error=error, apart=apart) for plan, error, apart in known)], 9, 2, 9
    )
    shown = capsys.readouterr().out
    assert "draws: noise draws of one image differ by l2 0.1000, l3 0.0100 of that variance" in shown
    assert said is None or said in shown
    assert (said is None) == ("codecs lose" not in shown)


@pytest.mark.parametrize("of_a_sample", [1, 99, 110])
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_spent(of_a_sample: int) -> None:
    codecs = {"l2": "transform", "l3": "transform"}
    said = (
        rf"budget of {1000 * of_a_sample} bytes is {of_a_sample} for each of 1000 samples; .* take about \d+: give more"
    )
    with pytest.raises(ConfigError, match=said):
        assume_codec(PLANS, codecs, None, 1000 * of_a_sample, 1000)


@pytest.mark.parametrize("stage", ASSUMED_BY_STAGE)
def test_assumed_ratios_grow_with_the_error(stage: str) -> None:
    ratios = [assumed_ratio(error, stage) for error in (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3)]
    assert ratios == sorted(ratios)
    known = ASSUMED_BY_STAGE[stage]
    assert (ratios[1], ratios[3], ratios[5]) == pytest.approx((known[0.01], known[0.03], known[0.1]))
    for error in (0.005, 0.02, 0.05, 0.3):
        assert assumed_error(assumed_ratio(error, stage), stage) == pytest.approx(error)
    assert assumed_error(1e9, stage) == 1


@pytest.mark.parametrize(
    ("form", "coder", "zstd_level", "stage"),
    [
        ("zarr", "zstd", 3, "zstd 3"),
        ("zarr", "zstd", 19, "zstd 12"),
        ("zarr", "rans", None, "rans"),
        ("webdataset", "zstd", None, "npy"),
        ("webdataset", "rans", None, "rans"),
    ],
)
def test_what_is_assumed_is_of_what_makes_the_bytes(form: str, coder: str, zstd_level: int | None, stage: str) -> None:
    recipe = golden.make_recipe(golden.Settings(form))
    coded = recipe.model_copy(update={"codec": CodecRecipe(symbols_zstd_level=zstd_level)})
    assert assumed_stage(coded, coder) == stage
    assert assume_codec(PLANS, {"l2": "transform"}, 0.03, None, 1000, stage)[1].assumed == stage
