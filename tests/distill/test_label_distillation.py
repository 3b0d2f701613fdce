"""Runs that learn from soft labels, alone or beside features: what they learn, keep, refuse, and how they go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.distill import trainer as module
from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.data import OpenedData, open_data
from dtpipe.distill.student.load import load_student
from dtpipe.manifests.errors import ConfigError
from parts.memory import FLIPPED_VIEWS, PX, level_spec, tiny_config, write_dataset
from parts.ranks import fork_ranks
from parts.runs import WITHOUT_BATCH_NORM, assert_equal_checkpoints, losses, train_on
from parts.settings import changed
from parts.soft_labels import CLASSES, LABELS, POOLED, Labelled, with_labels, write_labels

ONLY = {"loss": {"mse_weight": 0, "at_weight": 0}, "labels": {"weight": 1.0, "dropout": 0.0}}
SOURCE = Labelled(views=FLIPPED_VIEWS, levels=(level_spec("l3", 8, 6), level_spec("l4", 16, 10)))


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("data")
    features = write_dataset(root / "features", SOURCE)
    return str(features), str(write_labels(root / "labels", SOURCE, features))


@pytest.fixture
def config(urls: tuple[str, str], tmp_path: Path) -> DistillConfig:
    return tiny_config(tmp_path / "run", datasets=urls, join=True)


def in_memory(labels=LABELS) -> OpenedData:
    return OpenedData(with_labels(SOURCE, labels), (PX, PX), "0" * 64, classes={labels.name: CLASSES})


def terms(folder: Path) -> set[str]:
    return {name.partition("/")[0] for name in read_metrics(folder)[-1]} & {"mse", "at", "labels", "kept"}


def test_joined_soft_labels_are_learned_beside_the_features(config):
    module.train(config)
    state = load_checkpoint(Path(config.run.out) / "last.pt", "distill")
    assert terms(Path(config.run.out)) == {"mse", "at", "labels"}
    line = read_metrics(Path(config.run.out))[-1]
    assert line["loss"] == pytest.approx(line["mse"] + 10 * line["at"] + line["labels"], rel=1e-5)
    assert state["decoder_spec"] == {
        **{"kind": "masks", "classes": list(CLASSES), "width": 8, "norm": "batch", "ppm_scales": [1, 2, 3, 6]},
        "dropout": 0.1,
    }
    for name, value in state["regressor"].items():  # one module under two names
        if name.startswith("laterals."):
            assert torch.equal(state["decoder"][f"head.{name}"], value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (ONLY, {"labels"}),
        ({"labels": {"weight": 0.0}}, {"mse", "at"}),
        ({"labels": {"confidence": 0.9}, "levels": ("l3",)}, {"mse", "at", "labels", "kept"}),
        ({"levels": (LABELS.name,)}, {"labels"}),
    ],
)
def test_weights_and_levels_choose_features_labels_or_both(config, changes, expected):
    config = changed(config, epochs=1, **changes)
    module.train(config)
    assert terms(Path(config.run.out)) == expected
    state = load_checkpoint(Path(config.run.out) / "last.pt", "distill")
    assert ("decoder" in state, state["regressor"] is not None) == ("labels" in expected, "mse" in expected)
    assert load_student(config.run.out).spec.name == "test_resnet"


@pytest.mark.parametrize("labels", [LABELS, POOLED])
def test_a_student_learns_what_the_labels_say(tmp_path, labels):
    """Bright or dark, for each place or of the image; the loss of a student that knows them is their entropy."""
    lr = 3e-2 if labels is LABELS else 1e-2
    config = tiny_config(tmp_path, epochs=8, lr=lr, flip=False, log_every=3, **ONLY)
    data = in_memory(labels)
    train_on(data, config)
    values = [line["labels"] for line in read_metrics(tmp_path)]
    rows = data.source.columns.ok_rows
    _, coded = data.source.read(rows, [labels.name], np.zeros(len(rows), np.int64))
    soft = (torch.from_numpy(coded.decode()[labels.name]).double() / 4).softmax(dim=1)
    entropy = -(soft * soft.log()).sum(dim=1).mean().item()
    constant = soft.mean(dim=(0, 2, 3))
    blind = -(constant * constant.log()).sum().item()
    assert values[0] > blind
    assert values[-1] - entropy < 0.5 * (blind - entropy)


def test_flipped_images_have_the_labels_of_flipped_views(urls, tmp_path):
    config = tiny_config(tmp_path, datasets=urls, join=True, micro_batch=None, batch_size=19, epochs=1)
    trainer = module.Distillation(config, open_data(config), torch.device("cpu"))
    batch = next(trainer.batches(0))
    bright = batch.images.float().mean(dim=-1).reshape(-1, 4, 8, 4, 8).mean(dim=(2, 4))
    torch.testing.assert_close(batch.levels[LABELS.name][:, 1].float(), (bright - 125) / 8, atol=0.02, rtol=0)
    sources = [SOURCE.image(int(key[-7:-4])) for key in batch.keys]
    flipped = [bool((image.numpy() != own).any()) for image, own in zip(batch.images, sources, strict=True)]
    assert 0 < sum(flipped) < len(flipped)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"datasets": 0, "join": False, "labels": {"weight": 1.0}}, "weight is 1, and the data has no soft labels"),
        ({"loss_weights": (1.0, 0.3)}, r"give it 1 there, and its weight as -s distill.labels.weight=0.3"),
        ({"levels": (LABELS.name,), "labels": {"weight": 0.0}}, "none is left to learn from"),
        ({"levels": ("l3.label",)}, r"distill.levels names \['l3.label'\]"),
    ],
)
def test_what_the_data_does_not_have_is_said(config, urls, changes, said):
    changes = {name: urls[:1] if name == "datasets" else value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=said):
        module.train(changed(config, **changes))


def test_labels_of_two_interpreters_are_refused_unless_one_is_named(config, urls, tmp_path):
    other = str(write_labels(tmp_path / "other", SOURCE, urls[0], LABELS.model_copy(update={"tap": "another"})))
    both = changed(config, datasets=(*urls, other))
    with pytest.raises(ConfigError, match=r"l3.labels, l3.b are soft labels of several"):
        module.train(both)
    module.train(changed(both, levels=("l3", "l3.b"), epochs=1))
    assert "labels/l3.b" in read_metrics(Path(config.run.out))[-1]


def killing(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    updated = module.Distillation.updated

    def updating(trainer: module.Distillation, taken: int) -> None:
        updated(trainer, taken)
        if taken == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.Distillation, "updated", updating)
        yield


def test_a_run_that_was_killed_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    """With dropout, an average and mid-epoch saves: steps of a resumed run are those of an unbroken one."""
    config = changed(config, ema_decay=0.9, save_every_s=1e-9)
    whole = changed(config, out=str(tmp_path / "whole"))
    module.train(whole)
    for _ in killing(monkeypatch, 4):
        with pytest.raises(Killed):
            module.train(config)
    assert module.train(config).resumed_step == 3
    assert_equal_checkpoints(tmp_path / "whole" / "last.pt", Path(config.run.out) / "last.pt")
    state: dict[str, Any] = load_checkpoint(Path(config.run.out) / "last.pt", "distill")
    assert any(not torch.equal(state["decoder"][name], average) for name, average in state["decoder_ema"].items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes")
def test_two_processes_take_the_steps_of_one(config, tmp_path):
    """Without dropout, which each draws on its own samples."""
    config = changed(config, **WITHOUT_BATCH_NORM, labels={"dropout": 0.0, "confidence": 0.6})
    one = changed(config, out=str(tmp_path / "one"))
    module.train(one)
    assert fork_ranks(lambda _: module.train(config).num_steps, tmp_path, 2) == [6, 6]
    np.testing.assert_allclose(losses(config), losses(one), rtol=0, atol=1e-5)
