"""The demo's folder: an interrupted demo is gone on with, and nothing that is another's is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtpipe.manifests.errors import ConfigError, LockHeldError
from dtpipe.pipeline.config import DemoConfig
from dtpipe.pipeline.demo.folder import held_folder
from parts.paths import REPO


def demo(out: Path, **settings: object) -> DemoConfig:
    return DemoConfig(out=str(out), num_images=16, num_held_out=16, **settings)


def interrupted(out: Path) -> Path:
    """The folder of a demo that left something."""
    with held_folder(demo(out), False, print):
        (out / "scenes").mkdir()
        (out / "scenes" / "0.png").write_bytes(b"scene")
    return out


def kept(out: Path) -> bool:
    return (out / "scenes" / "0.png").is_file()


@pytest.mark.slow
def test_a_killed_demo_is_gone_on_with_and_keeps_what_it_made(tmp_path: Path) -> None:
    out, notes = tmp_path / "demo", []
    words = ["demo", "--out", str(out), "--num-images", "16", "-s", "demo.num_held_out=16"]
    with subprocess.Popen(
        [sys.executable, "-m", "dtpipe.pipeline.cli.main", *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("$ dtpipe extract") for line in process.stdout)  # scenes are written before
        with (
            pytest.raises(LockHeldError, match="another demo runs in this folder"),
            held_folder(demo(out), True, print),
        ):
            pass
        os.killpg(process.pid, signal.SIGKILL)
    with held_folder(demo(out), False, notes.append):
        assert len(list((out / "scenes" / "images").rglob("*.png"))) == 16
    assert notes == [f"goes on with the demo in {out}; --fresh starts over"]


def test_a_demo_of_other_settings_or_another_version_is_refused_and_kept(tmp_path: Path) -> None:
    out, marker = interrupted(tmp_path / "demo"), tmp_path / "demo" / ".dtpipe-demo"

    def refusal(**settings: object) -> str:
        with pytest.raises(ConfigError) as caught, held_folder(demo(out, **settings), False, print):
            pass
        assert kept(out)
        return str(caught.value)

    assert refusal(epochs=7, seed=3).startswith(f"{out} holds another demo (epochs: 6 -> 7; seed: 0 -> 3); start over")
    document = json.loads(marker.read_text())
    marker.write_text(json.dumps({**document, "version": "0.0.1"}))
    assert 'holds another demo (version: "0.0.1" -> ' in refusal()
    marker.write_text("")  # as the first versions left it
    assert refusal().startswith(f"{out} holds a demo of an earlier version; start over with --fresh")
    marker.write_text("{")
    assert "--fresh" in refusal()
    marker.write_text(json.dumps(document))
    with held_folder(demo(out, workers=7), False, print):  # decides no number
        assert kept(out)


def test_fresh_empties_the_folder_of_any_demo_and_follows_no_link(tmp_path: Path) -> None:
    out, elsewhere = interrupted(tmp_path / "demo"), tmp_path / "photos"
    elsewhere.mkdir()
    (elsewhere / "1.png").touch()
    (out / "link").symlink_to(elsewhere)
    with held_folder(demo(out, epochs=7), True, print):
        assert {path.name for path in out.iterdir()} == {".dtpipe-demo", ".lock"}
    assert (elsewhere / "1.png").is_file()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["photo.png", "folder"])
def test_what_no_demo_wrote_is_refused_and_kept(name: str, fresh: bool, tmp_path: Path) -> None:
    foreign = tmp_path / name
    if name == "folder":
        foreign.mkdir()
    inside = foreign / "thesis.tex" if name == "folder" else foreign
    inside.write_text("years of work")
    with (
        pytest.raises(ConfigError, match=r"holds something that no demo wrote|is a file; give a folder"),
        held_folder(demo(foreign), fresh, print),
    ):
        pass
    assert inside.read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="lies below"),
        held_folder(demo(tmp_path / "file" / "demo"), False, print),
    ):
        pass


def test_make_demo_throws_nothing_away() -> None:
    lines = subprocess.run(
        ["make", "-n", "--no-print-directory", "demo"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    assert lines.rstrip().endswith("dtpipe demo")
