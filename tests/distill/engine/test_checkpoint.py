"""Checkpoints are whole or absent, and load without running code."""

from __future__ import annotations

import os

import pytest
import torch

from dtpipe.distill.engine.checkpoint import keep_epoch, load_checkpoint, save_checkpoint
from dtpipe.distill.student.load import load_student
from dtpipe.manifests.errors import DamagedDataError, InputError, StoreError


def test_a_checkpoint_loads_with_weights_only(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"weights": {"a": torch.arange(3)}, "step": 4, "none": None})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 4
    assert torch.equal(load_checkpoint(tmp_path / "last.pt")["weights"]["a"], torch.arange(3))
    assert os.listdir(tmp_path) == ["last.pt"]  # noqa: PTH208  no temporary file is left


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        save_checkpoint(tmp_path / "last.pt", {"step": 2})
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]  # noqa: PTH208


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.zeros(1000)})
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"\x00\x01" * 500}[damage])
    with pytest.raises(DamagedDataError, match=r"last\.pt"):
        load_checkpoint(path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"format": "dtpipe-run/1", "evil": Evil()}, tmp_path / "last.pt")
    with pytest.raises(DamagedDataError):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "pwned").exists()


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a checkpoint of dtpipe"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(InputError, match="no checkpoint here"):
        load_student(tmp_path)


@pytest.mark.parametrize("num_kept", [0, 2])
def test_epoch_checkpoints_rotate(tmp_path, num_kept):
    for epoch in range(1, 5):
        save_checkpoint(tmp_path / "last.pt", {"epoch": epoch})
        keep_epoch(tmp_path / "last.pt", epoch, num_kept)
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert kept == ["epoch-00003.pt", "epoch-00004.pt"][2 - num_kept :]
    assert [load_checkpoint(tmp_path / "checkpoints" / name)["epoch"] for name in kept] == [3, 4][2 - num_kept :]
