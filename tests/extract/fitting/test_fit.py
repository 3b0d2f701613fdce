"""Codecs are fitted before the plan, once: what is stored keeps the error asked for, and goes on with the same fit."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from dtpipe.extract.config import LiveConfig
from dtpipe.extract.fitting.request import codec_recipe
from dtpipe.extract.run import run_extraction
from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.codecs import transform_fit
from dtpipe.manifests.codecs.fitted import fitted_names
from dtpipe.manifests.codecs.registry import CODECS
from dtpipe.manifests.errors import ConfigError, InputError, PlanChangedError, StoppedError
from dtpipe.manifests.fidelity import FIT_EXPECTS
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import LevelSpec
from dtpipe.manifests.store.store import Store
from dtpipe.pipeline.cli.console import Console, format_bytes
from dtpipe.pipeline.plan.extraction import plan_extraction, print_extraction
from dtpipe.pipeline.report.inspect import describe_dataset
from dtpipe.pipeline.report.provenance import datasets_section
from parts import golden
from parts.damage import flip
from parts.extractions import Extract, MakeConfig
from parts.fits import relative_mse
from parts.images import write_images


def levels_of(url: str) -> dict[str, np.ndarray]:
    """All good rows. Shapes: -> {level: [N, C, h, w]}."""
    dataset = FeatureDataset.open(url)
    rows = dataset.columns.ok_rows
    return dataset.read(rows, [level.name for level in dataset.levels], [0] * len(rows), images=False)[1].decode()


def objects_of(root: Path | str) -> dict[str, bytes]:
    files = [path for path in sorted(Path(root).rglob("*")) if path.is_file()]
    named = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in named.items() if name.startswith(("data", "codecs"))}


@pytest.fixture
def many(tmp_path: Path) -> str:
    """Forty images."""
    return str(write_images(tmp_path / "many", 40))


@pytest.mark.parametrize(("form", "coder"), [("zarr", "zstd"), ("zarr", "rans"), ("webdataset", "rans")])
def test_stored_features_lose_what_was_asked_for(form: str, coder: str, extract: Extract, many: str) -> None:
    shard = {"samples": 20, "format": form}
    coded = extract("coded", images=many, shard=shard, codec={"max_error": 0.05, "coder": coder})
    plain = levels_of(extract("plain", images=many, shard={**shard, "dtype": "float32"}))
    dataset = FeatureDataset.open(coded)
    described = describe_dataset(coded)["levels"]
    assert {(level["codec"], level["coder"]) for level in described} == {("transform", coder)}
    headers = 40 * 128 if form == "webdataset" else 0  # the norms are npy there
    for level in described:
        assert level["expected_bytes"] == pytest.approx(level["size_bytes"] - headers, rel=0.1)
    sections = datasets_section([coded], lambda *_: None).html
    for level in described:
        shown = (format_bytes(level[name]) for name in ("size_bytes", "expected_bytes"))
        assert "{} {} (expected {})".format(level["name"], *shown) in sections
    assert set(fitted_names(*dataset.levels)) <= set(dataset.manifest.files)  # type: ignore[union-attr]
    for name, decoded in levels_of(coded).items():
        assert relative_mse(decoded, plain[name]) == pytest.approx(0.05, rel=0.3)  # the held-out samples are ten
    assert dataset.plan.provenance[FIT_EXPECTS]["samples"] == 40
    assert verify(coded, "decode").ok


@pytest.mark.parametrize(("form", "coder"), [("zarr", "zstd"), ("zarr", "rans"), ("webdataset", "zstd")])
def test_all_of_a_level_may_be_lost(form: str, coder: str, extract: Extract, many: str) -> None:
    url = extract(images=many, shard={"samples": 20, "format": form}, codec={"max_error": 0.999, "coder": coder})
    assert verify(url, "decode").ok
    symbols = [level.codec.parameters["symbols"] for level in FeatureDataset.open(url).levels]
    assert min(symbols) == 1


@pytest.mark.parametrize(
    ("device", "codec", "level"),
    [
        ("cpu", {"max_error": 0.1}, 12),
        ("cuda", {"max_error": 0.1}, 3),  # a GPU is not to wait
        ("cuda", {"max_error": 0.1, "zstd_level": 19}, 19),
        ("cpu", {"max_error": 0.1, "coder": "rans"}, None),
        ("cpu", {"name": "int8"}, None),  # of which a higher level makes no fewer bytes
        ("cpu", {}, None),
    ],
)
def test_symbols_have_a_level_of_zstd_of_their_own(device: str, codec: dict[str, Any], level: int | None) -> None:
    """So that leaving all else uncompressed, `zstd_level: 0`, is no half of the bytes thrown away."""
    for form in ("zarr", "webdataset"):  # tars have no zstd
        chosen = {name: value for name, value in codec.items() if form == "zarr" or name != "zstd_level"}
        fields = {"images": "x", "teacher": {"path": "x"}, "codec": chosen, "shard": {"zstd_level": 0, "format": form}}
        config = LiveConfig.model_validate(fields)
        recipe = codec_recipe(config, golden.LEVELS, device)
        assert (recipe.zstd_level, recipe.symbols_zstd_level) == (0, level if form == "zarr" else None)
    assert golden.make_recipe(golden.Settings()).model_dump()["codec"] == {"name": "cast", "zstd_level": 3}


@pytest.mark.parametrize(
    ("shard", "of_images", "of_features"),
    [
        ({}, 3, 0),  # of which zstd makes next to nothing, and reading a multiple
        ({"zstd_level": 3}, 3, 3),
        ({"zstd_level": 0}, 0, 0),
    ],
)
def test_features_are_compressed_where_it_is_asked_for(
    extract: Extract, many: str, shard: dict[str, Any], of_images: int, of_features: int
) -> None:
    url = extract("some", images=many, shard={"samples": 40, **shard})
    for array, level in (("image", of_images), ("l2", of_features), ("l3", of_features)):
        metadata = json.loads(Path(url, "data.zarr", array, "zarr.json").read_text())
        [sharding] = metadata["codecs"]
        inner = {codec["name"]: codec.get("configuration", {}) for codec in sharding["configuration"]["codecs"]}
        assert inner.get("zstd", {"level": 0})["level"] == level
    assert verify(url, "decode").ok
    by_zarr: Any = zarr.open_group(f"{url}/data.zarr", mode="r")["l2"]
    assert np.array_equal(by_zarr[:, 0], levels_of(url)["l2"])


def test_tars_have_no_zstd_and_say_what_they_said() -> None:
    config = LiveConfig.model_validate({"images": "x", "teacher": {"path": "x"}, "shard": {"format": "webdataset"}})
    assert codec_recipe(config, golden.LEVELS, "cpu").model_dump() == {"name": "cast", "zstd_level": 3}


def test_chunks_left_uncompressed_are_not_the_symbols(extract: Extract, many: str) -> None:
    urls = [
        extract(f"level{level}", images=many, shard={"samples": 40, "zstd_level": level}, codec={"max_error": 0.1})
        for level in (0, 3)
    ]
    symbols = [objects_of(url)["data.zarr/l2/c/0/0/0"] for url in urls]
    norms = [objects_of(url)["data.zarr/l2_norm/c/0/0/0"] for url in urls]
    assert symbols[0] == symbols[1] and norms[0] != norms[1]


def test_a_fit_follows_from_the_settings_and_not_from_how_the_run_went(extract: Extract, many: str) -> None:
    codec = {"max_error": 0.1, "fit_samples": 20}
    settings: dict[str, Any] = {"images": many, "shard": {"samples": 16}, "codec": codec}
    first = objects_of(extract("first", **settings))
    assert objects_of(extract("second", **settings, decode_threads=5)) == first
    other = objects_of(extract("other", **settings, source={"seed": 1}))
    fits = [{name for name in objects if name.startswith("codecs")} for objects in (first, other)]
    assert fits[0].isdisjoint(fits[1])


def test_a_dataset_that_is_gone_on_with_keeps_its_fit(
    make_config: MakeConfig, many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(images=many, shard={"samples": 16}, codec={"max_error": 0.1})
    digest = run_extraction(config).digest
    out = Path(config.run.out)
    (out / "manifest.json").unlink()
    (out / "commits/00001.json").unlink()
    monkeypatch.setattr("dtpipe.extract.fitting.run.fit_task", None)  # another fit would fail
    assert run_extraction(config).digest == digest
    with pytest.raises(PlanChangedError, match=r"extract\.codec\.max_error: 0\.1 -> 0\.2"):
        run_extraction(config.model_copy(update={"codec": config.codec.model_copy(update={"max_error": 0.2})}))
    with pytest.raises(PlanChangedError, match=r"extract\.codec\.coder: not set -> \"rans\""):
        run_extraction(config.model_copy(update={"codec": config.codec.model_copy(update={"coder": "rans"})}))
    with pytest.raises(PlanChangedError, match=r"extract\.codec\.name: \"transform\" -> \"cast\""):
        run_extraction(config.model_copy(update={"codec": type(config.codec)()}))


@pytest.mark.parametrize(("damage", "coder"), [("flipped", "zstd"), ("flipped", "rans"), ("deleted", "rans")])
def test_a_lost_fit_is_found_named_and_fitted_again(
    damage: str, coder: str, make_config: MakeConfig, many: str
) -> None:
    config = make_config(images=many, shard={"samples": 16}, codec={"max_error": 0.1, "coder": coder})
    digest = run_extraction(config).digest
    before, dataset = objects_of(config.run.out), FeatureDataset.open(config.run.out)
    (name,) = fitted_names(next(level for level in dataset.levels if level.name == "l2"))
    path = Path(config.run.out) / name
    flip(path) if damage == "flipped" else path.unlink()
    with pytest.raises(Exception, match=name):
        read_level(FeatureDataset.open(config.run.out), "l2", 0)
    read_level(FeatureDataset.open(config.run.out), "l3", 0)
    (problem,) = verify(config.run.out, "decode").problems
    assert (problem.name, problem.mend) == (name, "fit")
    kept = repair(config.run.out, stale_s=1).kept
    assert list(kept) == ([name] if damage == "flipped" else [])
    assert run_extraction(config).digest == digest
    assert verify(config.run.out, "decode").ok
    assert objects_of(config.run.out).items() >= before.items()


def test_a_fit_that_comes_out_otherwise_is_not_taken_for_the_lost_one(make_config: MakeConfig, many: str) -> None:
    config = make_config(images=many, shard={"samples": 16}, codec={"max_error": 0.1})
    run_extraction(config)
    (name, *_) = fitted_names(*FeatureDataset.open(config.run.out).levels)
    (Path(config.run.out) / name).unlink()
    shutil.rmtree(many)
    write_images(Path(many), 40, start=40)
    with pytest.raises(PlanChangedError, match=r"fitting again gives other numbers.*put back a copy"):
        run_extraction(config)


def size_on_disk(url: str) -> int:
    """Of all files."""
    return sum(path.stat().st_size for path in Path(url).rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("form", "samples", "coder"), [("zarr", 1000, "zstd"), ("zarr", 16, "rans"), ("webdataset", 16, "rans")]
)
def test_a_budget_is_kept_by_the_whole_dataset(
    form: str, samples: int, coder: str, make_config: MakeConfig, many: str
) -> None:
    shard = {"samples": samples, "format": form}  # a last shard that is not full, or more shards than one
    codec = {"max_error": 0.05, "coder": coder}
    budget = round(1.03 * size_on_disk(run_extraction(make_config(images=many, shard=shard, codec=codec)).url))
    codec = {"budget": str(budget), "coder": coder}
    result = run_extraction(make_config(images=many, shard=shard, codec=codec, out=f"{many}-within"))
    assert 0.9 * budget < size_on_disk(result.url) <= budget
    assert result.over_budget is None


def test_a_budget_makes_each_basis_twice_whatever_its_rounds(
    make_config: MakeConfig, many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the samples of the curves, and from all; bases are what a fit at ADM's size spends its time on."""
    shapes: list[tuple[int, ...]] = []
    transformed = transform_fit._transformed

    def counted(features: NDArray[np.generic], *rest: Any) -> Any:
        shapes.append(features.shape)
        return transformed(features, *rest)

    monkeypatch.setattr(transform_fit, "_transformed", counted)
    run_extraction(make_config(images=many, shard={"samples": 16}, codec={"budget": "180kB"}))
    assert sorted(Counter(shapes).values()) == [2, 2]


def test_a_budget_that_a_dataset_exceeds_all_the_same_is_said_with_what_mends_it(
    make_config: MakeConfig, many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtpipe.extract.fitting.fit._ROOM", 2.0)
    config = make_config(images=many, shard={"samples": 16}, codec={"budget": "100kB"})
    for _ in range(2):  # also where nothing is left to do
        result = run_extraction(config)
        said = re.match(
            r"the dataset takes (\d+) bytes, [\d.]+% more .* 100000; .* --budget (\d+)", result.over_budget or ""
        )
        assert said and int(said[1]) == pytest.approx(size_on_disk(result.url), abs=2000)  # beside the lock
        assert int(said[2]) < 100_000**2 / int(said[1])


def test_a_budget_that_cannot_be_met_is_refused(make_config: MakeConfig, many: str) -> None:
    for run in (plan_extraction, run_extraction):
        with pytest.raises(ConfigError, match=r"extract.codec.budget of 1000 bytes is \d+ for each of 40 samples"):
            run(make_config(images=many, out=f"{many}-small", codec={"budget": "1kB"}))
    assert not Store(f"{many}-small").exists("plan.json")


def test_generators_are_fitted_to_what_they_make(gan: dict[str, str], make_config: MakeConfig) -> None:
    result = run_extraction(
        make_config(
            images=None,
            num_samples=24,
            teacher=gan,
            noise={},
            shard={"samples": 8},
            codec={"max_error": 0.2},
            max_bad=2,
        )
    )
    assert {level.codec.name for level in FeatureDataset.open(result.url).levels} == {"transform"}
    assert verify(result.url, "decode").ok


def test_bad_images_are_passed_over_and_a_source_without_a_good_one_is_named(
    make_config: MakeConfig, image_folder: Path
) -> None:
    said: list[str] = []
    paths = sorted(image_folder.rglob("*.png"))
    paths[0].write_bytes(b"no image")
    config = make_config(codec={"max_error": 0.1}, max_bad=10)
    result = run_extraction(config, lambda progress: said.append(progress.message or ""))
    assert (result.num_ok, result.num_bad) == (7, 1)
    assert any("fitted to 7 samples only" in text for text in said)
    for path in paths:
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a codec is to be fitted, and none of the 8 samples"):
        run_extraction(make_config(codec={"max_error": 0.1}, out=f"{config.run.out}-bad"))


def test_codecs_are_chosen_by_level_and_without_a_fit_where_none_is_needed(extract: Extract, many: str) -> None:
    mixed = FeatureDataset.open(
        extract("mixed", images=many, shard={"samples": 20}, codec={"levels": {"l3": "int8"}, "max_error": 0.1})
    )
    assert {level.name: level.codec.name for level in mixed.levels} == {"l2": "transform", "l3": "int8"}
    plain = FeatureDataset.open(extract("int8", images=many, shard={"samples": 20}, codec={"name": "int8"}))
    assert FIT_EXPECTS not in plain.plan.provenance
    assert plain.plan.provenance["selection"].keys() == {"limit", "keys_blake3"}
    for refused, why in (
        ({"levels": {"l7": "int8"}}, "names l7, and the levels of features are l2, l3"),
        ({"name": "int8", "max_error": 0.1}, "no level has a codec that is fitted"),
        ({"zstd_level": 9}, "zstd_level is 9, of symbols that are fitted .* there are none"),
        ({"max_error": 0.1, "coder": "rans", "zstd_level": 9}, "zstd_level is 9"),
        ({"coder": "rans"}, "coder is rans, whose tables are fitted, and no level has a codec that is"),
    ):
        with pytest.raises(ConfigError, match=why):
            extract("refused", images=many, codec=refused)


def test_an_error_that_no_step_can_keep_is_refused(make_config: MakeConfig, many: str) -> None:
    for run in (plan_extraction, run_extraction):
        with pytest.raises(
            ConfigError, match=r"max_error is 1e-06, .* ask for .* or more, or .*levels\.l2=int8 or cast"
        ):
            run(make_config(images=many, out=f"{many}-fine", codec={"max_error": 1e-6}))
    assert not Store(f"{many}-fine").exists("plan.json")


@pytest.mark.parametrize(
    ("form", "coder", "plain"), [("webdataset", "zstd", True), ("webdataset", "rans", False), ("zarr", "zstd", False)]
)
def test_tars_that_gain_nothing_by_a_fit_are_said(
    form: str, coder: str, plain: bool, make_config: MakeConfig, many: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    config = make_config(images=many, shard={"samples": 40, "format": form}, codec={"max_error": 0.1, "coder": coder})
    print_extraction(Console(), plan_extraction(config))
    assert ("-s extract.codec.coder=rans packs them" in capsys.readouterr().out) == plain
    run_extraction(config, lambda progress: said.append(progress.message or ""))
    assert any("-s extract.codec.coder=rans packs them" in text for text in said) == plain


@pytest.mark.parametrize("after", [5, 45])
def test_a_stop_ends_a_fit_within_a_level(
    after: int, make_config: MakeConfig, many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five calls are among the samples of the first level's basis, 45 among its steps: forty samples come first."""
    steps: list[int] = []
    said: list[str] = []
    codec = CODECS["transform"]

    def stopped(level: LevelSpec, features: NDArray[np.generic], on_step: Callable[[], None]) -> Any:
        def step() -> None:
            steps.append(1)
            if len(steps) == after:
                signal.raise_signal(signal.SIGTERM)
            on_step()

        return transform_fit.fit_transform(level, features, step)

    monkeypatch.setitem(CODECS, "transform", replace(codec, fit=stopped))
    with pytest.raises(StoppedError, match="codecs were being fitted: stopped by SIGTERM; nothing is written yet"):
        run_extraction(
            make_config(images=many, codec={"max_error": 0.1}), lambda progress: said.append(progress.message or "")
        )
    assert len(steps) == after
    assert not any("is fitted" in text for text in said)


def test_a_plan_reads_no_sample_for_a_fit_and_says_what_would_be(
    make_config: MakeConfig, many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtpipe.extract.fitting.run.fit_task", None)
    plan = plan_extraction(make_config(images=many, codec={"max_error": 0.1}))
    assert plan.to_fit == {"levels": {"l2": "transform", "l3": "transform"}, "max_error": 0.1, "samples": 512}
