"""A disk that is really full: one sentence with exit code 8, nothing half-written, and a run that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dtpipe.distill.engine.checkpoint import load_checkpoint, save_checkpoint
from dtpipe.distill.engine.run_folder import RunFolder, read_metrics
from dtpipe.distill.engine.trackers.base import TrackedRun
from dtpipe.distill.engine.trackers.tensorboard import ScalarWriter
from dtpipe.distill.export.write import export_student
from dtpipe.manifests.errors import StoreError
from parts.disks import BLOCK, files_on, fill, small_disk
from parts.line import KIND, LineConfig, fit, run_settings
from parts.memory import write_student
from parts.runs import assert_equal_checkpoints
from parts.settings import build, changed

# TensorBoard's own thread may end with the error after the test that provoked it
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
MB = 2**20
WEIGHTS = {"weights": torch.zeros(MB // 4 + 1000)}  # a checkpoint of a little over 1 MB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8 * MB) as place:
        yield place


class Checkpoint:
    """As `CheckpointIO`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def save(self, path: Path) -> None:
        save_checkpoint(path, KIND, {"step": self.step, **WEIGHTS})


def steps_on(disk: Path) -> dict[str, int]:
    return {
        path.relative_to(disk).as_posix(): load_checkpoint(path, KIND)["step"] for path in sorted(disk.rglob("*.pt"))
    }


@pytest.fixture
def folder(disk: Path) -> Iterator[RunFolder]:
    """A run with the checkpoints of steps 1 to 5, the last two of them ends of epochs that are kept."""
    with RunFolder.open(run_settings(build(LineConfig, {"out": str(disk / "run")}))) as opened:
        for step in range(1, 6):
            opened.save(Checkpoint(step), epoch=step, num_kept=2)  # type: ignore[arg-type]
        yield opened


def test_room_for_a_checkpoint_is_made_of_those_that_it_would_replace(disk: Path, folder: RunFolder) -> None:
    fill(disk)
    before = {"last.pt": 5, "previous.pt": 4, "checkpoints/epoch-00004.pt": 4, "checkpoints/epoch-00005.pt": 5}
    assert steps_on(folder.path) == before
    folder.save(Checkpoint(6), epoch=6, num_kept=2)  # type: ignore[arg-type]
    after = {"last.pt": 6, "previous.pt": 5, "checkpoints/epoch-00005.pt": 5, "checkpoints/epoch-00006.pt": 6}
    assert steps_on(folder.path) == after


def test_in_the_middle_of_an_epoch_no_end_of_one_is_deleted(disk: Path, folder: RunFolder) -> None:
    fill(disk)
    with pytest.raises(StoreError, match=r"last\.pt: the checkpoint cannot be written: .*No space left"):
        folder.save(Checkpoint(6))  # type: ignore[arg-type]
    assert steps_on(folder.path)["checkpoints/epoch-00004.pt"] == 4


@pytest.mark.parametrize("leave_bytes", [0, BLOCK, MB // 2, MB])
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_and_nothing_else_new(disk: Path, leave_bytes: int) -> None:
    """Wherever in the file the room ends: also where its seal would be."""
    save_checkpoint(disk / "last.pt", KIND, {"step": 1, **WEIGHTS})
    fill(disk, leave_bytes)
    with pytest.raises(StoreError, match=r"No space left.*; free or change the disk and run again") as error:
        save_checkpoint(disk / "last.pt", KIND, {"step": 2, **WEIGHTS})
    assert error.value.exit_code == 8
    assert files_on(disk) == {"last.pt"}
    assert load_checkpoint(disk / "last.pt", KIND)["step"] == 1


def test_a_run_on_a_full_disk_stops_and_goes_on_bit_for_bit_once_there_is_room(disk: Path, tmp_path: Path) -> None:
    whole = build(LineConfig, {"out": str(tmp_path / "whole")})
    fit(whole)
    config = changed(whole, out=str(disk / "run"))

    def after(step: int) -> None:
        if step == 6:
            fill(disk)

    with pytest.raises(StoreError, match=r"cannot be written.*No space left") as error:
        fit(config, after)
    assert error.value.exit_code == 8
    assert not [name for name in files_on(disk) if name.endswith(".tmp")]
    read_metrics(disk / "run")  # whole lines only
    (disk / "filling").unlink()
    assert fit(config).resumed_step == 4
    assert_equal_checkpoints(tmp_path / "whole" / "last.pt", disk / "run" / "last.pt", KIND)
    assert [line["loss"] for line in read_metrics(disk / "run")] == [
        line["loss"] for line in read_metrics(tmp_path / "whole")
    ]


def test_a_line_that_finds_no_room_is_taken_back(disk: Path, folder: RunFolder) -> None:
    fill(disk)
    lines = 0
    with pytest.raises(StoreError, match=r"metrics\.jsonl cannot be written: .*; free or change the disk") as error:
        for lines in range(1000):
            folder.log({"step": lines, "loss": 0.5})
    assert error.value.exit_code == 8
    assert [line["step"] for line in read_metrics(folder.path)] == list(range(lines))
    assert (folder.path / "metrics.jsonl").read_bytes().endswith(b"}\n") or not lines


def test_tensorboards_events_that_find_no_room_are_a_store_error(disk: Path) -> None:
    writer = ScalarWriter(TrackedRun(disk, "line", {}, "id", 1))
    fill(disk)
    with pytest.raises(StoreError, match=r"tensorboard cannot be written: .*No space left.*leave tracker tens"):
        for step in range(1000):
            writer.add({"step": step, "loss": 0.5, "lr": 1.0})
    writer.close("failed")


def test_a_run_cannot_begin_on_a_full_disk(disk: Path) -> None:
    fill(disk)
    with pytest.raises(StoreError, match="cannot be written"):
        fit(build(LineConfig, {"out": str(disk / "run")}))
    assert files_on(disk) <= {"run/.lock"}


@pytest.mark.parametrize("leave_bytes", [0, MB, 17 * MB // 4])
def test_an_export_that_finds_no_room_leaves_nothing(tmp_path: Path, disk: Path, leave_bytes: int) -> None:
    checkpoint = write_student(tmp_path / "last.pt", "test_resnet")
    fill(disk, min(leave_bytes, 300_000))
    with pytest.raises(StoreError, match=r"export cannot be written: .*make room or choose another --out") as error:
        export_student(checkpoint, disk / "export")
    assert error.value.exit_code == 8
    assert files_on(disk) == set()
