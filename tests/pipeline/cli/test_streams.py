"""Commands whose standard streams are closed, full, or read by nobody: they do their work and exit as they would."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dtpipe.pipeline.cli.main import main
from parts.damage import flip
from parts.extractions import Extract

SMALL = ["--student", "resnet10t", "--batch-size", "4", "--epochs", "1", "-s", "distill.regressor.width=8"]


def exit_codes(set_up: Callable[[], None], folder: Path, *commands: list[object]) -> list[int]:
    """Exit codes of command lines, one after the other, in a process whose standard streams `set_up` changed."""
    answer = folder / "codes.json"
    if not (pid := os.fork()):
        try:
            set_up()
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                stream = as_python_opens(number)
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)
            answer.write_text(json.dumps([exit_code(command) for command in commands]))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    codes: list[int] = json.loads(answer.read_text())
    return codes


def as_python_opens(descriptor: int) -> object:
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    return os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False)


def exit_code(command: list[object]) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in command])
    return int(ended.value.code or 0)


def close_all() -> None:
    os.closerange(0, 3)


def send_to_nobody() -> None:
    """Stdout and stderr into a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def fill_stdout() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def fill_stderr() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


@pytest.mark.parametrize("set_up", [close_all, send_to_nobody])
def test_commands_work_on_without_streams(set_up, tmp_path: Path, image_folder: Path, ddpm: Path) -> None:
    features, run, extra = tmp_path / "features", tmp_path / "run", ["-s", "extract.shard.samples=4"]
    commands = [
        ["extract", "--inline", "--images", image_folder, "--teacher", ddpm, "--out", features, *extra],
        ["verify", features],
        ["distill", features, "--out", run, *SMALL],
        ["export", run, "--out", tmp_path / "export"],
        ["report", run, "--num-images", 1],
        ["list", "--json"],
        ["distil"],
    ]
    assert exit_codes(set_up, tmp_path, *commands) == [0, 0, 0, 0, 0, 0, 2]
    assert json.loads((features / "manifest.json").read_text())["complete"] is True
    assert (tmp_path / "export" / "model.safetensors").stat().st_size > 0


def test_damage_has_its_exit_code_when_nobody_reads_of_it(tmp_path: Path, extract: Extract) -> None:
    features = Path(extract())
    flip(next(path for path in sorted((features / "data.zarr" / "l2" / "c").rglob("*")) if path.is_file()), 10)
    assert exit_codes(send_to_nobody, tmp_path, ["verify", features]) == [4]


def test_files_do_not_get_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what a library prints would be written into them."""

    def close_and_check() -> None:
        close_all()
        from dtpipe.pipeline.cli.streams import keep_streams

        sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None  # type: ignore[assignment,misc]
        keep_streams()
        with (tmp_path / "data").open("w") as file:
            os.write(1, b"printed")
            os.write(2, b"printed")
            (tmp_path / "number").write_text(str(file.fileno()))

    exit_codes(close_and_check, tmp_path, ["list"])
    assert int((tmp_path / "number").read_text()) > 2
    assert (tmp_path / "data").read_bytes() == b""


def test_a_full_disk_loses_progress_but_no_result_in_silence(tmp_path: Path) -> None:
    assert exit_codes(fill_stdout, tmp_path, ["list", "teachers"]) == [8]
    assert exit_codes(fill_stderr, tmp_path, ["list", "teachers"], ["lisst"]) == [0, 2]
