"""Checkpoints are whole or absent, and load without running code."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from dtpipe.distill.engine.checkpoint import CheckpointIO, keep_epoch, load_checkpoint, save_checkpoint
from dtpipe.distill.student.load import load_student
from dtpipe.manifests.errors import DamagedDataError, InputError, StoreError

KIND = "distill"


def test_a_checkpoint_loads_with_weights_only(tmp_path):
    save_checkpoint(tmp_path / "last.pt", KIND, {"weights": {"a": torch.arange(3)}, "step": 4, "none": None})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 4
    assert torch.equal(load_checkpoint(tmp_path / "last.pt", KIND)["weights"]["a"], torch.arange(3))
    assert os.listdir(tmp_path) == ["last.pt"]  # noqa: PTH208  no temporary file is left


def test_a_checkpoint_is_on_disk_before_it_replaces_the_last(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", KIND, {"step": 1})
    synced = []

    def look(descriptor: int) -> None:
        temporary = Path(f"/proc/self/fd/{descriptor}").readlink()
        if temporary.is_file():
            synced.append([load_checkpoint(path, KIND)["step"] for path in (temporary, tmp_path / "last.pt")])

    monkeypatch.setattr(os, "fsync", look)
    save_checkpoint(tmp_path / "last.pt", KIND, {"step": 2})
    assert synced == [[1, 1], [2, 1]]  # the one before under its other name, then the new one
    assert load_checkpoint(tmp_path / "previous.pt", KIND)["step"] == 1


def test_a_full_disk_is_named_and_keeps_the_last_checkpoint(tmp_path):
    """Full for files of more than 10 kB; the error comes out of torch's writer."""
    save_checkpoint(tmp_path / "last.pt", KIND, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            StoreError, match=r"last\.pt: the checkpoint cannot be written: .*; free or change the disk"
        ):
            save_checkpoint(tmp_path / "last.pt", KIND, {"step": 2, "weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path / "last.pt", KIND)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]  # noqa: PTH208


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", KIND, {"step": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        save_checkpoint(tmp_path / "last.pt", KIND, {"step": 2})
    assert load_checkpoint(tmp_path / "last.pt", KIND)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]  # noqa: PTH208


@pytest.mark.parametrize(
    "content", [b'{"format": 1}', b"\x80\x02cos\nsystem\n."], ids=["JSON", "a pickle that runs code"]
)
def test_nobody_is_told_to_run_what_lies_in_a_file(tmp_path, content):
    """torch's own message says how."""
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(DamagedDataError, match="it is not a file of tensors and plain values") as error:
        load_checkpoint(tmp_path / "last.pt", KIND)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "last.pt"
    save_checkpoint(path, KIND, {"weights": torch.zeros(1000)})
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "garbage": b"\x00\x01" * 500}[damage])
    with pytest.raises(DamagedDataError, match=r"last\.pt"):
        load_checkpoint(path, KIND)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    torch.save({"format": "dtpipe-run/2", "kind": KIND, "evil": Evil()}, tmp_path / "last.pt")
    with pytest.raises(DamagedDataError):
        load_checkpoint(tmp_path / "last.pt", KIND)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(3), 7, ["config"], {"student": {}, "step": 3}])
def test_other_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: not a checkpoint of dtpipe distill"):
        load_checkpoint(tmp_path / "other.pt", "distill")
    with pytest.raises(InputError, match="no checkpoint here"):
        load_student(tmp_path)


@pytest.mark.parametrize(("kind", "said"), [("train_teacher", "dtpipe train-teacher"), ("eval", "export --head")])
def test_a_checkpoint_of_another_command_is_refused(tmp_path, kind, said):
    save_checkpoint(tmp_path / "last.pt", kind, {"step": 1})
    with pytest.raises(InputError, match=f"not a checkpoint of dtpipe distill .* but of .*{said}"):
        load_checkpoint(tmp_path / "last.pt", "distill")
    assert load_checkpoint(tmp_path / "last.pt", kind)["step"] == 1


def test_what_is_named_is_restored_and_plain_values_stay_as_they_are(tmp_path):
    def parts() -> dict[str, object]:
        torch.manual_seed(len(list(tmp_path.iterdir())))
        model = nn.Linear(2, 2)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "none": None, "classes": ["cat"]}

    first = parts()
    first["model"](torch.ones(1, 2)).sum().backward()
    first["optimizer"].step()
    CheckpointIO(KIND, **first).save(tmp_path / "last.pt")
    second = parts()
    assert not torch.equal(first["model"].weight, second["model"].weight)
    state = load_checkpoint(tmp_path / "last.pt", KIND)
    assert (state["none"], state["classes"]) == (None, ["cat"])
    CheckpointIO(KIND, **second).restore(state, "last.pt")
    assert torch.equal(first["model"].weight, second["model"].weight)
    assert second["optimizer"].state_dict()["state"][0]["step"] == 1
    with pytest.raises(DamagedDataError, match=r"last\.pt: the checkpoint lacks \['average'\]"):
        CheckpointIO(KIND, **second, average=nn.Linear(2, 2)).restore(state, "last.pt")


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (
            {"format": "dtpipe-run/1", "student": {}, "scheduler": {"step": 7, "num_steps": 9}, "stream": {"epoch": 1}},
            "distill",
            {"student": {}, "step": 7, "scaler": None},
        ),
        (
            {"config": '{"px": 8}', "unet": {}, "ema": {}, "step": 3, "losses": [0.5]},
            "train_teacher",
            {
                "config": {"px": 8},
                "unet": {},
                "ema": {},
                "step": 3,
                "scaler": None,
                "classes": [],
                "started_from": None,
            },
        ),
    ],
)
def test_checkpoints_of_older_formats_are_read_in_todays_form(tmp_path, content, kind, expected):
    torch.save(content, tmp_path / "last.pt")
    assert expected.items() <= load_checkpoint(tmp_path / "last.pt", kind).items()


@pytest.mark.parametrize("num_kept", [0, 2])
def test_epoch_checkpoints_rotate(tmp_path, num_kept):
    for epoch in range(1, 5):
        save_checkpoint(tmp_path / "last.pt", KIND, {"epoch": epoch})
        keep_epoch(tmp_path / "last.pt", epoch, num_kept)
    kept = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert kept == ["epoch-00003.pt", "epoch-00004.pt"][2 - num_kept :]
    assert [load_checkpoint(tmp_path / "checkpoints" / name, KIND)["epoch"] for name in kept] == [3, 4][2 - num_kept :]
