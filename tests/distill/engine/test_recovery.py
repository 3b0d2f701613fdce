"""A checkpoint is used as it was written or not at all, and a run outlives the loss of its last one."""

from __future__ import annotations

import io
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtpipe.distill.engine import recovery
from dtpipe.distill.engine.checkpoint import load_checkpoint, save_checkpoint
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.manifests.errors import DamagedDataError, PlanChangedError
from parts.damage import flip, flipped
from parts.line import KIND, LineConfig, fit
from parts.ranks import fork_ranks
from parts.runs import assert_equal_checkpoints
from parts.settings import build, changed

SEAL_BYTES = 79


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps: last.pt of step 12, previous.pt of step 8, and epochs of steps 4 and 8."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(config_of(out))
    return out


def config_of(out: Path) -> LineConfig:
    return build(LineConfig, {"out": str(out), "num_kept": 3, "dropout": 0.3})


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy without hard links, so that each file can be damaged alone; without what was last.pt by another name."""
    ignored = shutil.ignore_patterns("epoch-00003.pt")
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=ignored))


def test_any_flipped_bit_of_a_checkpoint_is_found(finished: Path, tmp_path: Path) -> None:
    """In the seal and in 120 places between: names, settings, tensors, padding and the archive's directory."""
    data, path = (finished / "last.pt").read_bytes(), tmp_path / "last.pt"
    places = [*range(0, len(data), len(data) // 120), *range(len(data) - SEAL_BYTES, len(data))]
    for place in places:
        path.write_bytes(flipped(data, place, 1 << place % 8))
        with pytest.raises(DamagedDataError, match=r"last\.pt"):
            load_checkpoint(path, KIND)
            pytest.fail(f"byte {place}")
    path.write_bytes(data)
    assert load_checkpoint(path, KIND)["step"] == 12


def test_a_checkpoint_from_before_seals_loads_and_its_tensors_are_checked(finished: Path, tmp_path: Path) -> None:
    """By the checksums that torch writes and does not read."""
    path, old = tmp_path / "last.pt", (finished / "last.pt").read_bytes()[:-SEAL_BYTES]
    path.write_bytes(old)
    assert_equal_checkpoints(path, finished / "last.pt", KIND)
    with zipfile.ZipFile(path) as archive:
        tensors = [member for member in archive.infolist() if "/data/" in member.filename]
    assert len(tensors) >= 6
    for member in tensors:
        name = member.header_offset + 26  # of the local header, where the lengths of name and padding stand
        lengths = int.from_bytes(old[name : name + 2], "little"), int.from_bytes(old[name + 2 : name + 4], "little")
        path.write_bytes(flipped(old, member.header_offset + 30 + sum(lengths) + member.file_size // 2))
        with pytest.raises(DamagedDataError, match=f"its part {member.filename} does not match its checksum"):
            load_checkpoint(path, KIND)


def test_others_read_a_sealed_checkpoint(finished: Path) -> None:
    whole = torch.load(finished / "last.pt", weights_only=True)
    mapped = torch.load(finished / "last.pt", weights_only=True, mmap=True)
    assert whole["step"] == mapped["step"] == 12
    with zipfile.ZipFile(finished / "last.pt") as archive:
        assert archive.testzip() is None


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "ends in zeros": lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_whose_last_checkpoint_is_lost_goes_on_from_the_one_before_bit_for_bit(
    run: Path, finished: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](run / "last.pt")
    with caplog.at_level(logging.WARNING):
        result = fit(config_of(run))
    assert result.resumed_step == 8
    assert_equal_checkpoints(finished / "last.pt", run / "last.pt", KIND)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 13))
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(finished)]
    (note,) = result.notes
    assert [record.message for record in caplog.records] == [note]
    assert note.startswith(f"{run}/last.pt: ")
    assert "; going on from step 8, which " in note
    assert os.path.lexists(run / "last.pt.damaged") == (damage != "gone")  # kept: the disk may be what is broken
    assert fit(config_of(run)).notes == ()


def test_a_run_goes_on_from_the_newest_whole_checkpoint_of_all(run: Path, finished: Path) -> None:
    for path in (run / "last.pt", run / "previous.pt", *sorted((run / "checkpoints").iterdir())[1:]):
        flip(path)
    result = fit(config_of(run))
    assert result.resumed_step == 4
    assert "going on from step 4, which epoch-00001.pt holds" in result.notes[0]
    assert_equal_checkpoints(finished / "last.pt", run / "last.pt", KIND)


def test_a_run_without_a_whole_checkpoint_is_refused_and_nothing_is_touched(run: Path) -> None:
    for path in run.rglob("*.pt"):
        flip(path)
    before = {path: path.read_bytes() for path in run.rglob("*.pt")}
    with pytest.raises(DamagedDataError, match=r"last\.pt: does not match its own digest") as error:
        fit(config_of(run))
    assert error.value.exit_code == 4
    assert {path: path.read_bytes() for path in run.rglob("*.pt")} == before


def test_who_only_reads_a_damaged_checkpoint_is_told_how_to_get_it_back(run: Path) -> None:
    flip(run / "last.pt")
    with pytest.raises(DamagedDataError, match=r"run dtpipe line again, which goes on from (previous|epoch-\d+)\.pt"):
        load_checkpoint(run / "last.pt", KIND)
    assert not (run / "last.pt.damaged").exists()


@pytest.mark.parametrize("names", [("last.pt",), ("last.pt", "previous.pt")])
def test_a_checkpoint_of_another_run_is_refused_naming_the_settings(run: Path, tmp_path: Path, names: tuple) -> None:
    """On the same data, and of the same shapes: all else would fit."""
    other = changed(config_of(tmp_path / "other"), lr=0.5)
    fit(other)
    for name in names:
        shutil.copyfile(tmp_path / "other" / name, run / name)
    with pytest.raises(PlanChangedError, match=r"last\.pt is of a run with other settings \(line\.lr: 0\.5 -> 0\.02\)"):
        fit(config_of(run))


def test_one_process_reads_the_checkpoint_for_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its digest is taken once, however many train together."""

    def counted(path: Path, kind: str) -> dict[str, object]:
        with (tmp_path / "reads").open("a") as file:
            file.write(f"{os.environ['RANK']} {path.name}\n")
        return load_checkpoint(path, kind)

    monkeypatch.setattr(recovery, "load_checkpoint", counted)
    flip(run / "last.pt")
    answers = fork_ranks(lambda _: [fit(config_of(run)).resumed_step], tmp_path, 2)
    assert answers == [[8], [8]]
    assert {line.split()[0] for line in (tmp_path / "reads").read_text().splitlines()} == {"0"}


# --- archives that unpack to more than they are -----------------------------------------------------------------------


def packed(path: Path, compression: int) -> None:
    """The same checkpoint with 64 MB of zeros, packed: a file of a few hundred kB."""
    whole = io.BytesIO()
    torch.save({"format": "dtpipe-run/2", "kind": KIND, "step": 1, "zeros": torch.zeros(2**24)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w", compression) as small:
        for member in archive.infolist():
            small.writestr(member.filename, archive.read(member))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: int
) -> None:
    packed(tmp_path / "last.pt", compression)
    assert (tmp_path / "last.pt").stat().st_size < 2**20
    for opened in (torch, "load"), (zipfile.ZipFile, "open"), (zipfile.ZipFile, "testzip"):
        monkeypatch.setattr(*opened, lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(
        DamagedDataError, match=r"is a packed archive of 671\d+ bytes in a file of \d+, and a checkpoint"
    ):
        load_checkpoint(tmp_path / "last.pt", KIND)


@pytest.mark.parametrize(
    ("pickle", "said"),
    [
        (b"\x80\x02}(" + b")" + b"\x85" * 10**6 + b"K\x01u.", "nests more than 16 tuples"),  # as a key
        (b"\x80\x02}()" + b"(0N\x86N\x86" * 20 + b"K\x01u.", "nests more than 16 tuples"),
        (b"\x80\x02}()q\x00" + b"0h\x00\x85q\x00" * 20 + b"K\x01u.", "nests more than 16 tuples"),  # from the memo
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "asks for a byte array"),
        (b"\x80\x04\x8c\x08builtins\x8c\tbytearray\x93J\xff\xff\xff\x7f\x85R.", "asks for a byte array"),
        (b"\x80\x02\x96" + (2**40).to_bytes(8, "little") + b".", "cannot be read"),
        (b"\x80\x02}(u0000.", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_checkpoint_that_would_end_or_fill_the_process_is_refused(tmp_path: Path, pickle: bytes, said: str) -> None:
    """A small file: hashing tuples within tuples without end overflows the stack, and a byte array has any size."""
    whole = io.BytesIO()
    torch.save({"step": torch.zeros(3)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "last.pt", "w") as other:
        for member in archive.infolist():
            other.writestr(member, pickle if member.filename.endswith("data.pkl") else archive.read(member))
    with pytest.raises(DamagedDataError, match=said):
        load_checkpoint(tmp_path / "last.pt", KIND)


def test_a_checkpoint_whose_parts_lie_over_each_other_is_refused(tmp_path: Path) -> None:
    """A directory that names one stored part again and again needs no packing to unpack to any size."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, KIND, {"weights": torch.zeros(10_000)})
    path.write_bytes(path.read_bytes()[:-SEAL_BYTES])
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.filelist, key=lambda member: member.file_size)
        archive.filelist += [largest] * 20
        archive._didModify = True
    with pytest.raises(DamagedDataError, match="is a packed archive of 8"):
        load_checkpoint(path, KIND)
