"""Checkpoints of a teacher: whole or not there, readable for ever, and refused by name when they are something else."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_state import CHECKPOINT, load_checkpoint, resume_or_start, save_checkpoint
from dtpipe.extract.train_teacher import train_teacher
from dtpipe.manifests.errors import DamagedDataError, StoreError
from parts import paths

FIXTURES = paths.FIXTURES / "train"
OURS = {"config": "{}", "unet": {}, "ema": {}, "optimizer": {}, "step": 1, "losses": []}


def make(out: Path, **changes: object) -> TrainTeacherConfig:
    tiny = json.loads((FIXTURES / "tiny.json").read_text())
    return TrainTeacherConfig.model_validate(tiny | {"images": "", "out": str(out)} | changes)


@pytest.mark.parametrize(
    "content", [7, torch.zeros(3), ["config"], {"student": {}, "step": 3}, {**OURS, "config": '{"px": "wide"}'}]
)
def test_a_checkpoint_of_another_kind_is_refused_by_name(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(DamagedDataError, match=r"last\.pt: .*(no checkpoint of a teacher|lacks|settings)"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_checkpoint_of_the_first_version_trains_on(image_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    path.write_bytes(gzip.decompress((FIXTURES / "first_version_last.pt.gz").read_bytes()))
    saved = load_checkpoint(path)
    assert saved["step"] == 3
    settings = json.loads(saved["config"]) | {"images": str(image_folder), "out": str(tmp_path), "steps": 5}
    result = train_teacher(TrainTeacherConfig.model_validate(settings))
    assert (result.step, result.finished) == (5, True)
    first = saved["optimizer"]["state"]
    later = load_checkpoint(path)["optimizer"]["state"]
    assert {int(state["step"]) for state in first.values()} == {3}
    assert {int(state["step"]) for state in later.values()} == {5}  # the optimiser went on, it did not begin anew


def test_a_checkpoint_holds_all_that_changes(tmp_path: Path) -> None:
    config = make(tmp_path, precision="float16", class_conditional=True)
    state = resume_or_start(config, "cpu", classes=("a", "b"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state.scaler.scale(torch.ones(()))  # from then on it has a state
    state.step, state.losses, state.started_from = 5, [0.5], "0" * 64
    saved = load_checkpoint(save_checkpoint(config, state))
    again = resume_or_start(config, "cpu", saved, ("a", "b"))
    assert again.scaler.get_scale() == 8.0
    assert (again.step, again.losses, again.classes, again.started_from) == (5, [0.5], ("a", "b"), "0" * 64)


def test_a_full_disk_is_named_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path)
    state = resume_or_start(config, "cpu")
    save_checkpoint(config, state)
    state.step = 1

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StoreError, match=r"last\.pt: cannot write the checkpoint \(.*; make room and run the same command again"
    ):
        save_checkpoint(config, state)
    assert load_checkpoint(tmp_path / CHECKPOINT)["step"] == 0
