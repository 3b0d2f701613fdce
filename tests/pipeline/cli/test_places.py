"""Places as people write them on a command line: `~`, `::`, relative paths, names that are not UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dtpipe.pipeline.cli.main import COMMANDS, main
from parts.extractions import Extract

SMALL = ["--student", "resnet10t", "--batch-size", "4", "--epochs", "1", "-s", "distill.regressor.width=8"]


def run(*args: object) -> str:
    """The output of a command that must end well."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.output


def test_home_double_colons_and_relative_paths_in_every_command(
    tmp_path: Path, image_folder: Path, ddpm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder.rename(work / "a::b")
    (tmp_path / "teacher").symlink_to(ddpm)
    keys = sorted(path.relative_to(work / "a::b").as_posix() for path in (work / "a::b").rglob("*.png"))[:4]
    (tmp_path / "keys").write_text("\n".join(keys))
    (tmp_path / "mine.yaml").write_text("extract:\n  keys: ~/keys\n  run: {inline: true}\n")
    run("extract", "-c", "~/mine.yaml", "--images=a::b", "--teacher=~/teacher", "--out=~/c::d")
    assert "4 ok" in run("inspect", "~/c::d")
    assert "nothing is wrong" in run("verify", "../c::d", "--level", "recompute", "--rows", "1", "--teacher=~/teacher")
    run("distill", "../c::d", "--out=e::f", *SMALL)
    stored = yaml.safe_load((work / "e::f" / "config.yaml").read_text())["distill"]
    assert stored["datasets"] == [f"{tmp_path}/c::d"]
    monkeypatch.chdir(work / "elsewhere")
    probe = ["-s", "eval.probe.max_iter=2", "--seeds", 1, "--labelled", "all", "--limit", 4]
    run("eval", "../e::f", "probe", "--images=~/work/a::b", "--teacher=~/teacher", "--out=~/scores.json", *probe)
    assert (tmp_path / "scores.json").is_file()
    run("export", "~/work/e::f", "--out=~/g::h")
    assert (tmp_path / "g::h" / "model.safetensors").is_file()
    assert "left out" not in run("report", "../e::f", "--out=~/page.html", "--num-images", 1)
    run("inspect", "~/c::d", "--sample", keys[0], "--png=~/cat.png")
    assert (tmp_path / "cat.png").is_file()
    assert not list(work.rglob("~*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_argument_that_is_not_utf8_is_named(command: str) -> None:
    result = CliRunner().invoke(main, [command, os.fsdecode(b"--images=/caf\xe9")])
    assert result.exit_code == 2
    assert result.stderr.startswith(r"error: an argument is --images=/caf\xe9, which is not UTF-8; rename it, or ")


def content(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


INTO = [
    "distill FEATURES --out OUT",
    "distill --images IMAGES --teacher TEACHER --out OUT",
    "train-teacher --images IMAGES --out OUT",
    "extract --inline --images IMAGES --teacher TEACHER --out OUT",
    "export nowhere --out OUT",
    "demo --out OUT",
]


@pytest.fixture
def places(tmp_path: Path, image_folder: Path, ddpm: Path, extract: Extract, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with IMAGES, FEATURES, TEACHER, a RUN, a FILE and a DANGLING link in it."""
    monkeypatch.chdir(tmp_path)
    Path(extract("FEATURES"))
    image_folder.rename("IMAGES")
    Path("TEACHER").symlink_to(ddpm)
    Path("RUN").mkdir()
    Path("RUN/config.yaml").write_text("other: {a: 1}\n")
    Path("RUN/.lock").touch()
    Path("FILE").write_text("x")
    Path("DANGLING").symlink_to("moved/away")
    return tmp_path


def test_no_command_writes_into_what_others_made(places: Path) -> None:
    """A dataset, photographs, another kind of run, a file, below a file, a link into nothing, in a dataset."""
    others = {"FEATURES", "IMAGES", "RUN", "FILE", "FILE/a", "DANGLING", "FEATURES/a"}
    before = content(places)
    for command in INTO:
        for out in sorted(others - ({"FEATURES"} if command.startswith("extract") else set())):
            result = CliRunner().invoke(main, command.replace("OUT", out).split())
            assert (result.exit_code, "Traceback" in result.output) == (2, False), (command, out, result.output)
            assert out in result.stderr
    assert content(places) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("report nowhere --out PHOTO", "PHOTO is there, and dtpipe report did not write it"),
        ("report nowhere --out IMAGES", "IMAGES is a folder; give a file"),
        ("report nowhere --out FILE/page.html", "lies below"),
        ("eval nowhere probe --images IMAGES --out FEATURES/manifest.json", "dtpipe eval did not write it"),
        ("eval nowhere probe --images IMAGES --out FEATURES", "FEATURES is a folder"),
        ("inspect FEATURES --sample a --png PHOTO", "PHOTO is there, and dtpipe inspect did not write it"),
        ("distill FEATURES --out s3://bucket/run", "s3://bucket/run; write into a local or mounted folder"),
        ("export nowhere --out s3://bucket/run", "s3://bucket/run; write into a local or mounted folder"),
        ("EXTRACT --save-png IMAGES/png", "--save-png IMAGES/png lies among the images"),
        ("EXTRACT --save-png FEATURES", "--save-png FEATURES holds a feature dataset"),
        ("EXTRACT --save-png NEW", "--save-png NEW holds the dataset"),
        ("EXTRACT --save-png FILE", "FILE is a file"),
    ],
)
def test_no_file_is_written_over_what_others_made(places: Path, command: str, words: str) -> None:
    photo = str(next(Path("IMAGES").rglob("*.png")))
    extract = "extract --inline --images IMAGES --teacher TEACHER --out NEW"
    before = content(places)
    result = CliRunner().invoke(main, command.replace("PHOTO", photo).replace("EXTRACT", extract).split())
    assert result.exit_code == 2, result.output
    assert words.replace("PHOTO", photo) in result.stderr
    assert content(places) == before
