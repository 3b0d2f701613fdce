"""Samples that are encoded live get soft labels of their fresh noise, by the interpreter of the stored ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.labels.head import features_record
from dtpipe.distill.stream.data import StoredData
from dtpipe.distill.stream.live import LiveSamples
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images
from dtpipe.pipeline.live.teacher import open_live
from parts.command_line import RefusedError, dtpipe
from parts.images import write_images
from parts.interpreters import logits_of, write_interpreter
from parts.memory import tiny_config

EXACT = ("-s", "extract.shard.dtype=float32", "--inline", "--device", "cpu", "--batch-size", "4", "--flips")
TRAIN = ("--student", "test_resnet", "--epochs", "1", "--batch-size", "4", "--device", "cpu")
SMALL = ("-s", "distill.regressor.width=8", "-s", "distill.run.log_every=1", "-s", "distill.labels.dropout=0")


@pytest.fixture(scope="module")
def made(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Features of one draw and two timesteps with their soft labels, and of the same with the next draw too."""
    root = tmp_path_factory.mktemp("live")
    images = write_images(root / "images", 6)
    of_images = ("--images", str(images), "--teacher", str(ddpm), "--timesteps", "50,150", *EXACT)
    one = dtpipe("extract", *of_images, "--out", root / "one")["url"]
    two = dtpipe("extract", *of_images, "-s", "extract.noise.draws=2", "--out", root / "two")["url"]
    levels = FeatureDataset.open(one).levels
    heads = {
        "each": write_interpreter(root / "each", levels),
        "together": write_interpreter(root / "together", levels, num_views=2, record={"timesteps": [150, 50]}),
    }
    labels = {
        name: dtpipe("extract", "--interpreter", head, "--from", one, *EXACT[:-1], "--out", root / f"labels-{name}")[
            "url"
        ]
        for name, head in heads.items()
    }
    top = ("--top-k", "2", "--out", root / "labels-top")
    labels["top"] = dtpipe("extract", "--interpreter", heads["each"], "--from", one, *EXACT[:-1], *top)["url"]
    heads["top"] = heads["each"]
    return SimpleNamespace(images=images, teacher=ddpm, one=str(one), two=str(two), heads=heads, labels=labels)


@pytest.mark.parametrize("name", ["each", "together", "top"])
def test_fresh_labels_are_those_of_the_features_of_the_next_draw(made, tmp_path, name):
    """As `extract` stores them for that draw: read one by one, or both timesteps together, or the likeliest classes."""
    config = tiny_config(tmp_path, datasets=(made.one, made.labels[name]), join=True, reencode=1.0)
    data = StoredData(partial(open_live, {}, config=config))
    source = data.open(config).source
    (codec,) = FeatureDataset.open(made.labels[name]).codecs.values()
    live, stored = data.teacher(source, torch.device("cpu")), FeatureDataset.open(made.two)
    keys = tuple(source.columns.keys)
    for view, spec in enumerate(source.views):
        num = len(keys)
        samples = LiveSamples(keys, np.full(num, view), np.full(num, spec.flip), np.zeros(num, np.int64))
        images = torch.from_numpy(read_images(source, np.arange(num)))
        _, levels = live.encode(images, samples, live.prepare(samples))
        timesteps = [150, 50] if name == "together" else [spec.timestep]
        read = [stored.views.index(spec.model_copy(update={"draw": 1, "timestep": step})) for step in timesteps]
        for idx, key in enumerate(keys):
            expected = codec.decode(codec.encode(logits_of(made.heads[name], stored, stored.columns.row_of(key), read)))
            np.testing.assert_allclose(levels["l2.labels"][idx].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_another_interpreter_is_refused(made, tmp_path):
    other = write_interpreter(tmp_path / "other", FeatureDataset.open(made.one).levels, 1)
    datasets = (made.one, made.labels["each"])
    config = tiny_config(tmp_path, datasets=datasets, join=True, reencode=1.0, interpreter=other)
    data = StoredData(partial(open_live, {}, config=config))
    with pytest.raises(TeacherError, match=r"is not the interpreter that made .*--interpreter"):
        data.teacher(data.open(config).source, torch.device("cpu"))


def test_an_interpreter_beside_features_alone_is_refused(made, tmp_path):
    call = ("distill", made.one, "--reencode", "1", "--interpreter", made.heads["each"], *TRAIN, *SMALL)
    with pytest.raises(RefusedError, match=r"the data has no soft labels to learn from; join .*--join"):
        dtpipe(*call, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("temperature", "2"), ("confidence", "0.9")])
def test_the_likeliest_classes_alone_are_used_as_they_were_kept(made, tmp_path, name, value):
    call = ("distill", made.one, made.labels["top"], "--join", *TRAIN, *SMALL, "-s", f"distill.labels.{name}={value}")
    with pytest.raises(RefusedError, match=rf"distill\.labels\.{name} is .*l2\.labels holds the likeliest classes"):
        dtpipe(*call, "--out", tmp_path / "run")


def test_labels_are_read_of_the_features_of_their_own_teacher(made, tmp_path):
    """Of neither dataset by digest; the teacher's weights say which."""
    of_images = ("--images", made.images, "--teacher", made.teacher, "--timesteps", "50,150", *EXACT)
    other = dtpipe("extract", *of_images, "--untrained", "3", "--out", tmp_path / "untrained")["url"]
    again = dtpipe("extract", *of_images, "-s", "extract.noise.seed=1", "--out", tmp_path / "again")["url"]
    dataset = FeatureDataset.open(made.one)
    record = features_record(dataset.recipe, [level.name for level in dataset.levels])
    head = write_interpreter(tmp_path / "head", dataset.levels, record=record)
    labels = dtpipe("extract", "--interpreter", head, "--from", made.one, *EXACT[:-1], "--out", tmp_path / "labels")[
        "url"
    ]
    config = tiny_config(tmp_path, datasets=(other, again, labels), join=True, reencode=1.0)
    data = StoredData(partial(open_live, {}, config=config))
    live = data.teacher(data.open(config).source, torch.device("cpu"))
    assert live.names["l2"] == "l2.b"
    alone = tiny_config(tmp_path, datasets=(other, labels), join=True, reencode=1.0)
    data = StoredData(partial(open_live, {}, config=alone))
    with pytest.raises(TeacherError, match=r"other features than .*untrained has \(.*teacher.weights_blake3"):
        data.teacher(data.open(alone).source, torch.device("cpu"))


def test_a_run_mixes_stored_and_fresh_labels(made, tmp_path):
    call = ("distill", made.one, made.labels["each"], "--join", "--reencode", "0.5", *TRAIN, *SMALL)
    dtpipe(*call, "--out", tmp_path / "run")
    dtpipe(*call, "--out", tmp_path / "again", "--interpreter", made.heads["each"])
    first, second = ([line["labels"] for line in read_metrics(tmp_path / run)] for run in ("run", "again"))
    assert first == second and len(first) == 2


def test_images_with_a_teacher_and_an_interpreter_need_no_dataset(made, tmp_path):
    call = ("distill", "--images", made.images, "--teacher", made.teacher, "--timesteps", "50", *TRAIN, *SMALL)
    dtpipe(*call, "--interpreter", made.heads["each"], "--out", tmp_path / "run")
    assert {"mse", "labels"} <= read_metrics(tmp_path / "run")[-1].keys()
    stranger = write_interpreter(
        tmp_path / "stranger", FeatureDataset.open(made.one).levels, record={"teacher": {"weights_blake3": "ab" * 32}}
    )
    with pytest.raises(RefusedError, match="trained on other features than the teacher has"):
        dtpipe(*call, "--interpreter", stranger, "--out", tmp_path / "strange")
    with pytest.raises(RefusedError, match="interpreter"):
        other = write_interpreter(tmp_path / "other", FeatureDataset.open(made.one).levels, 1)
        dtpipe(*call, "--interpreter", other, "--out", tmp_path / "run")


def test_labels_without_their_features_cannot_be_made_anew(made, tmp_path):
    with pytest.raises(RefusedError, match=r"stores no images|holds soft labels"):
        dtpipe("distill", made.labels["each"], "--reencode", "1", *TRAIN, *SMALL, "--out", tmp_path / "run")
