"""Settings: later files win, wrong keys are refused with near matches, errors are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dtpipe.distill.config import DistillConfig, DistillRun
from dtpipe.distill.engine.run_folder import RunFolder
from dtpipe.distill.trainer import run_settings
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import Settings
from dtpipe.pipeline.cli.settings import (
    SECTIONS,
    check_key,
    dump,
    gather,
    load_document,
    model_keys,
    parse_sets,
    section_model,
    submodel,
    validate,
)

NEEDED = {"extract.images": "photos", "extract.teacher.path": "teacher", "extract.run.out": "out"}


def write(path: Path, value: object) -> str:
    path.write_text(yaml.safe_dump(value))
    return str(path)


def test_later_files_win_and_siblings_stay(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {"extract": {"noise": {"timesteps": [50], "draws": 2}, "limit": 5}})
    second = write(tmp_path / "b.yaml", {"extract": {"noise": {"draws": 3}}})
    config = validate(gather([first, second], {}, NEEDED), "extract")
    assert (config.noise.timesteps, config.noise.draws, config.limit) == ((50,), 3, 5)


def test_set_and_flags_win_over_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {"extract": {"limit": 5, "batch_size": 4}})
    config = validate(gather([first], {"extract.limit": 6}, {**NEEDED, "extract.batch_size": 8}), "extract")
    assert (config.limit, config.batch_size) == (6, 8)


def test_one_key_from_set_and_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"extract\.limit is given both with -s and as a flag"):
        gather([], {"extract.limit": 5}, {"extract.limit": 6})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("extract.noise.timesteps=[50, 150]", "extract.noise.timesteps", [50, 150]),
        ("extract.noise.timesteps=50,150", "extract.noise.timesteps", [50, 150]),
        ("extract.noise.timesteps=50", "extract.noise.timesteps", [50]),
        ("extract.transform.px=64", "extract.transform.px", 64),
        ("extract.transform.px=64,128", "extract.transform.px", [64, 128]),
        ("extract.images=123", "extract.images", "123"),
        ("extract.images=a=b", "extract.images", "a=b"),
        ("extract.keys=null", "extract.keys", None),
        ("extract.run.inline=true", "extract.run.inline", True),
        ("distill.lr=4e-3", "distill.lr", 0.004),
        ("distill.levels=l2,l3", "distill.levels", ["l2", "l3"]),
        ("extract.run.max_bad=5", "extract.run.max_bad", 5),
        ("extract.run.max_bad=0.5", "extract.run.max_bad", 0.5),
        ("extract.teacher.taps={l2: up.0}", "extract.teacher.taps", {"l2": "up.0"}),
        ("extract.teacher.taps.l2=up.0", "extract.teacher.taps.l2", "up.0"),
    ],
)
def test_set_values_are_yaml_of_the_fields_type(text: str, key: str, value: object) -> None:
    assert parse_sets([text]) == {key: value}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("extract.shard.fromat", "extract.shard.format"),
        ("extract.noise.timestep", "extract.noise.timesteps"),
        ("shard.format", "extract.shard.format"),
        ("distil.lr", "distill.lr"),
        ("extract.timesteps", "extract.noise.timesteps"),
    ],
)
def test_unknown_key_names_near_matches(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match="did you mean") as caught:
        parse_sets([f"{key}=1"])
    assert near in str(caught.value)


def test_unknown_key_in_a_file_names_file_and_near_match(tmp_path: Path) -> None:
    name = write(tmp_path / "a.yaml", {"distill": {"optimizer": "lamb", "loss": {"at_wieght": 1}}})
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key 'distill\.\w"):
        load_document(name)


def test_missing_values_name_their_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        validate({}, "extract", {"extract.run.out": "--out"})
    assert str(caught.value) == "extract.teacher.path, --out (extract.run.out) must be given"


@pytest.mark.parametrize("text", ["256", "[256]"])
def test_one_value_in_the_place_of_two_is_not_called_missing(text: str) -> None:
    sets = parse_sets([f"eval.tune.augment.crop_px={text}", "eval.tune.steps=1"])
    with pytest.raises(ConfigError) as caught:
        validate(gather([], sets, {"eval.checkpoint": "run", "eval.task": "segment", "eval.images": "photos"}), "eval")
    assert str(caught.value) == "eval.tune.augment.crop_px is [256]: it takes 2 values, as in [256, 256]"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("extract.batch_size", "many", ["extract.batch_size is 'many'", "whole number"]),
        ("extract.noise.timesteps", [-1.5], ["extract.noise.timesteps", "whole number"]),
        ("extract.transform.px", "wide", ["extract.transform.px is 'wide'", " or "]),
        ("extract.shard.format", "lmdb", ["extract.shard.format is 'lmdb'", "'zarr' or 'webdataset'"]),
        ("extract.run.max_bad", 1.5, ["extract.run.max_bad is 1.5", "share"]),
    ],
)
def test_a_wrong_value_is_one_sentence(key: str, value: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(gather([], {key: value}, NEEDED), "extract")
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(key) == 1
    assert all(word in message for word in words), message


def test_a_check_of_several_fields_names_each_once() -> None:
    values = {
        "distill.datasets": ["a"],
        "distill.run.out": "r",
        "distill.loss.mse_weight": 0,
        "distill.loss.at_weight": 0,
    }
    with pytest.raises(ConfigError, match=r"^distill.loss.mse_weight, distill.loss.at_weight, .* are all 0;"):
        validate(gather([], {}, values), "distill")
    needed = {"eval.tune.steps": 1, "eval.tune.epochs": 1}
    with pytest.raises(ConfigError, match=r"^eval\.tune: give eval\.tune\.steps or eval\.tune\.epochs, one of them"):
        validate(
            gather([], {}, {"eval.checkpoint": "run", "eval.images": "photos", "eval.task": "segment", **needed}),
            "eval",
        )
    both = {"extract.codec.max_error": 0.1, "extract.codec.budget": "1GB"}
    with pytest.raises(ConfigError, match=r"^extract\.codec\.max_error and extract\.codec\.budget are both set;"):
        validate(gather([], {**both}, NEEDED), "extract")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- 1\n- 2", "not a mapping"),
        ("extract: 5", "not a mapping"),
        ("extrakt:\n  out: a", "unknown key"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_document(str(path))


def test_a_missing_file_lists_presets() -> None:
    with pytest.raises(ConfigError, match="no such file, and no such preset") as caught:
        load_document("imagenett")
    assert "imagenet" in str(caught.value)


def test_dumped_settings_read_back_equal(tmp_path: Path) -> None:
    config = validate(gather([], {"extract.noise.timesteps": [1, 2]}, NEEDED), "extract")
    path = tmp_path / "config.yaml"
    path.write_text(dump(config, "extract"))
    assert validate(gather([str(path)], {}, {}), "extract") == config


def test_the_config_of_a_run_reads_back_equal(tmp_path: Path) -> None:
    run = DistillRun(out=str(tmp_path))
    config = DistillConfig(datasets=("blüten",), run=run, epochs=3, warmup_epochs=1, loss={"at_weight": 5})
    RunFolder.open(run_settings(config)).__exit__(None, None, None)
    assert validate(gather([str(tmp_path / "config.yaml")], {}, {}), "distill") == config


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_description(section: str) -> None:
    missing = [
        key
        for key in model_keys(section_model(section), section)
        if not (field := check_key(key, "")).description and not hasattr(field.annotation, "model_fields")
    ]
    assert missing == []


@pytest.mark.parametrize("section", [name for name in SECTIONS if issubclass(section_model(name), Settings)])
def test_a_key_that_moved_into_run_is_refused_by_its_new_name(section: str, tmp_path: Path) -> None:
    model = section_model(section)
    run = submodel(model.model_fields["run"].annotation)
    assert run is not None
    assert not run.model_fields.keys() & model.model_fields.keys()
    for name in run.model_fields:
        sentence = f"{section}.{name} is now {section}.run.{name}; write it so"
        with pytest.raises(ConfigError, match=f"^-s {section}.{name}=1: {sentence}$"):
            parse_sets([f"{section}.{name}=1"])
        with pytest.raises(ConfigError, match=rf"old\.yaml: {sentence}$"):
            load_document(write(tmp_path / "old.yaml", {section: {name: 1}}))


def test_all_keys_of_a_file_that_moved_are_said_at_once(tmp_path: Path) -> None:
    old = write(tmp_path / "old.yaml", {"extract": {"out": "features", "limit": 5, "workers": 2, "noise": {"draw": 1}}})
    with pytest.raises(ConfigError, match=r"old\.yaml: extract\.out is now extract\.run\.out, .*; write them so$"):
        load_document(old)


@pytest.mark.parametrize("key", ["extract.noise.out", "extract.outt", "run.out", "out", "extract.run.images"])
def test_a_key_that_was_nowhere_is_not_said_to_have_moved(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        parse_sets([f"{key}=1"])
