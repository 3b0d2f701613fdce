"""What a run trains on: which samples, how often, of which shards, and that a resumed run sees the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.record import read_record
from dtpipe.distill.engine.run_folder import RunFolder
from dtpipe.distill.stream.data import open_data
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.stream import FeatureStream
from dtpipe.distill.trainer import run_settings, stream_settings, train
from dtpipe.manifests.errors import ConfigError, DamagedDataError, IncompleteError, InputError, PlanChangedError
from dtpipe.manifests.read.source import read_image
from parts.memory import MemorySource, level_spec, tiny_config, write_dataset
from parts.settings import changed


def config(tmp_path: Path, *urls: Path, **changes: object) -> DistillConfig:
    return tiny_config(tmp_path / "run", datasets=tuple(map(str, urls)), **changes)


def chosen(settings: DistillConfig) -> list[str]:
    data = open_data(settings)
    assert data.sampling is not None
    return sorted(data.source.columns.keys[row] for row in data.sampling.rows)


def number(key: str) -> int:
    return int(key[-7:-4])


# --- selection -------------------------------------------------------------------------------------------------------


def test_keys_patterns_and_limit_choose_samples(tmp_path, source):
    url = write_dataset(tmp_path / "data_set", source)
    good = [f"images/{row:03d}.png" for row in source.columns.ok_rows]
    assert chosen(config(tmp_path, url)) == good
    file = tmp_path / "keys.txt"
    file.write_text("images/007.png\n\nimages/003.png\nimages/012.png\n")  # 3 is bad, which is no mistake of the file
    assert chosen(config(tmp_path, url, keys=str(file))) == ["images/007.png", "images/012.png"]
    assert chosen(config(tmp_path, url, include=("*/00?.png", "*19.png"), exclude=("*5.png",))) == [
        key for key in good if (number(key) < 10 or number(key) == 19) and number(key) % 10 != 5
    ]


def test_a_limit_takes_the_same_samples_whatever_the_order_of_rows_and_nested_ones(tmp_path, source):
    one = write_dataset(tmp_path / "one", source)
    other = write_dataset(tmp_path / "other", source, prefix="other")
    few, more = (chosen(config(tmp_path, one, limit=limit)) for limit in (5, 12))
    assert len(few) == 5 and len(more) == 12 and set(few) < set(more)
    assert chosen(config(tmp_path, other, one, include=("images/*",), limit=5)) == few
    assert len(chosen(config(tmp_path, one, limit=1000))) == 19


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"keys": "KEYS"}, InputError, r"1 of 2 wanted keys \('images/nothing.png'\) are not in the data"),
        ({"keys": "nowhere.txt"}, InputError, r"distill.keys: .*nowhere.txt: there is no such file"),
        (
            {"include": ("cat/*",)},
            ConfigError,
            r"distill.include: pattern 'cat/\*' matches no key; keys look like 'images/",
        ),
        ({"exclude": ("cat/*",)}, ConfigError, r"distill.exclude: pattern 'cat/\*' matches no key"),
        ({"exclude": ("*",)}, InputError, r"leave no sample to train on"),
        ({"include": ("*/003.png",)}, InputError, r"each of 1 chosen sample is bad"),
    ],
)
def test_a_selection_that_names_nothing_is_refused(tmp_path, source, changes, error, said):
    url = write_dataset(tmp_path / "features", source)
    (tmp_path / "keys.txt").write_text("images/007.png\nimages/nothing.png\n")
    changes = {name: str(tmp_path / "keys.txt") if value == "KEYS" else value for name, value in changes.items()}
    with pytest.raises(error, match=said):
        open_data(config(tmp_path, url, **changes))


# --- several datasets ------------------------------------------------------------------------------------------------


def test_sample_weights_are_passes_over_each_dataset(tmp_path):
    urls = [write_dataset(tmp_path / name, MemorySource(num_rows=10, bad=()), prefix=name) for name in ("a", "b")]
    settings = config(tmp_path, *urls, sample_weights=(1, 0.5), epochs=2)
    data = open_data(settings)
    stream = FeatureStream(data.source, stream_settings(settings, ("l2",)), torch.device("cpu"), None, data.sampling)
    halves = []
    for epoch in (0, 1):
        keys = [key for batch in stream.batches(StreamPosition()) if batch.epoch == epoch for key in batch.keys]
        assert sorted(key for key in keys if key.startswith("a/")) == [f"a/{row:03d}.png" for row in range(10)]
        halves.append({key for key in keys if key.startswith("b/")})
        assert len(keys) == 15
    assert halves[0] != halves[1]


def test_loss_weights_are_those_of_the_dataset_of_each_level(tmp_path, source):
    other = MemorySource(levels=(level_spec("l3", 8, 5), level_spec("l5", 32, 4)))
    urls = write_dataset(tmp_path / "one", source), write_dataset(tmp_path / "other", other, images="joined")
    data = open_data(config(tmp_path, *urls, join=True, loss_weights=(1, 0.3)))
    assert data.level_weights == {"l2": 1, "l3": 1, "l4": 1, "l3.b": 0.3, "l5": 0.3}
    some = config(tmp_path, *urls, join=True, loss_weights=(0, 0.3), levels=("l4", "l3.b"))
    assert open_data(some).level_weights == {"l4": 0, "l3.b": 0.3}
    with pytest.raises(ConfigError, match=r"give all of \['l4'\] the weight 0"):
        open_data(config(tmp_path, *urls, join=True, loss_weights=(0, 1), levels=("l4",)))


def test_loss_weights_reach_the_loss(tmp_path, source):
    other = MemorySource(levels=(level_spec("l3", 8, 5),))
    urls = write_dataset(tmp_path / "one", source), write_dataset(tmp_path / "other", other, images="joined")
    weights = {"l2": 1.0, "l3": 1.0, "l4": 1.0, "l3.b": 0.25}
    settings = config(tmp_path, *urls, join=True, loss_weights=(1, 0.25), epochs=1, loss={"at_weight": 0})
    losses = train(settings).losses
    expected = sum(weights[name] * losses[f"mse/{name}"] for name in weights) / sum(weights.values())
    assert losses["loss"] == pytest.approx(expected, rel=1e-5)


def test_loss_weights_of_views_are_refused(tmp_path, source):
    late = MemorySource(views=(source.views[0].model_copy(update={"timestep": 150}),))
    urls = write_dataset(tmp_path / "one", source), write_dataset(tmp_path / "late", late)
    with pytest.raises(ConfigError, match="hold the same levels of one teacher"):
        open_data(config(tmp_path, *urls, join=True, loss_weights=(1, 0.3)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_weights": (1, 2)}, "has 2 values for 1 dataset"),
        ({"sample_weights": (1,), "join": True}, "with --join give distill.loss_weights"),
        ({"loss_weights": (1,)}, "without --join give distill.sample_weights"),
        ({"loss_weights": (0,), "join": True}, "all 0"),
        ({"sample_weights": (0,)}, "greater than 0"),
        ({"equivariant": True, "flip": False}, "leave one of them out"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, Path("one"), **changes)


def test_weights_too_small_for_any_sample_are_refused(tmp_path, source):
    url = write_dataset(tmp_path / "one", source)
    with pytest.raises(ConfigError, match="of 19 samples leave none"):
        open_data(config(tmp_path, url, sample_weights=(0.01,)))


# --- unfinished datasets, and resumed runs ---------------------------------------------------------------------------


def test_a_run_on_an_unfinished_dataset_keeps_to_its_shards_once_it_is_finished(tmp_path, source):
    url = write_dataset(tmp_path / "part", source, merged=False)
    with pytest.raises(IncompleteError, match="--allow-incomplete"):
        open_data(config(tmp_path, url))
    settings = config(tmp_path, url, allow_incomplete=True, epochs=1)
    before = train(settings)
    assert read_record(tmp_path / "run")["datasets"][0]["shards"] == [0, 1]
    assert before.num_samples < 19
    write_dataset(url, source)  # the shard that was missing
    (tmp_path / "run" / "last.pt").unlink()
    again = train(changed(settings, allow_incomplete=False))  # it is finished, so nobody needs to allow anything
    assert (again.num_samples, again.losses) == (before.num_samples, before.losses)
    whole = tiny_config(tmp_path / "new", datasets=(str(url),), allow_incomplete=True)
    assert len(open_data(whole).sampling.rows) == 19  # of another run


def test_a_recorded_shard_that_is_gone_is_named(tmp_path, source):
    url = write_dataset(tmp_path / "part", source, merged=False)
    settings = config(tmp_path, url, allow_incomplete=True, epochs=1)
    train(settings)
    (url / "commits" / "00001.json").unlink()
    with pytest.raises(
        IncompleteError, match=r"shard 1 is needed and not committed; run the same `dtpipe extract` again"
    ):
        train(settings)


def test_a_resumed_run_refuses_other_data_naming_what_differs(tmp_path, source):
    url = write_dataset(tmp_path / "one", source)
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(f"images/{row:03d}.png" for row in range(12)))
    settings = config(tmp_path, url, epochs=1, keys=str(keys))
    train(settings)
    moved = (tmp_path / "keys-moved.txt", tmp_path / "moved")
    keys.rename(moved[0])
    url.rename(moved[1])
    settings = settings.model_copy(update={"keys": str(moved[0]), "datasets": (str(moved[1]),)})
    assert train(settings).resumed_step > 0  # where it lies does not matter
    moved[0].write_text("images/001.png\nimages/002.png\nimages/004.png\n")
    with pytest.raises(PlanChangedError, match=r"trained on other data \(samples.num: 10 -> 3; samples.rows_blake3"):
        train(settings)
    other = write_dataset(tmp_path / "other", MemorySource(bad=(3, 11, 12)))
    with pytest.raises(PlanChangedError, match=r"datasets\[0\].digest: "):
        train(settings.model_copy(update={"datasets": (str(other),)}))


def test_a_run_of_before_new_settings_existed_goes_on(tmp_path, source):
    url = write_dataset(tmp_path / "one", source)
    settings = config(tmp_path, url, epochs=1)
    RunFolder.open(run_settings(settings)).__exit__(None, None, None)
    file = tmp_path / "run" / "config.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]  # nor was it sealed
    old = [line for line in lines if "equivariant" not in line and "limit" not in line]
    file.write_text("\n".join(old))
    with RunFolder.open(run_settings(settings, open_data(settings))):
        assert json.loads((tmp_path / "run" / "data.json").read_text())["samples"]["num"] == 19


def test_no_dataset_is_refused_where_nothing_else_gives_the_data(tmp_path):
    with pytest.raises(ConfigError, match=r"distill.datasets is empty"):
        train(config(tmp_path))


def test_a_damaged_record_is_said(tmp_path, source):
    url = write_dataset(tmp_path / "one", source)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").write_text("{")
    with pytest.raises(DamagedDataError, match=r"data\.json: is not readable as JSON .*; restore the file"):
        open_data(config(tmp_path, url))


def test_labels_and_counts_of_the_chosen_samples_stay_with_their_keys(tmp_path, source):
    url = write_dataset(tmp_path / "one", source)
    settings = config(tmp_path, url, include=("*[02468].png",), epochs=1)
    data = open_data(settings)
    stream = FeatureStream(data.source, stream_settings(settings, ("l2",)), torch.device("cpu"), None, data.sampling)
    seen = Counter()
    for batch in stream.batches(StreamPosition()):
        for idx, key in enumerate(batch.keys):
            assert batch.labels[idx] == "even"
            np.testing.assert_array_equal(batch.images[idx].numpy(), read_image(source, number(key)))
            seen[number(key)] += 1
    assert seen == dict.fromkeys((row for row in source.columns.ok_rows if row % 2 == 0), 1)


def test_a_run_keeps_remote_shards_in_its_cache(tmp_path, source):
    root = write_dataset(tmp_path / "features", source)
    files = fsspec.filesystem("memory")
    for path in (path for path in root.rglob("*") if path.is_file()):
        files.pipe_file(f"/cached-run/{path.relative_to(root)}", path.read_bytes())
    config = tiny_config(tmp_path / "run", datasets=("memory://cached-run",), cache=str(tmp_path / "cache"))
    stream = FeatureStream(open_data(config).source, stream_settings(config, ("l2",)), torch.device("cpu"))
    plain = FeatureStream(
        open_data(changed(config, datasets=(str(root),))).source, stream_settings(config, ("l2",)), torch.device("cpu")
    )
    for one, other in zip(stream.batches(StreamPosition()), plain.batches(StreamPosition()), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.levels["l2"], other.levels["l2"])
    assert any(path.suffix != ".lock" for path in (tmp_path / "cache").iterdir())
