"""A live run flips wherever its teacher can encode that, at the teacher's timestep, unless it began otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dtpipe.distill import trainer as module
from dtpipe.distill.engine.checkpoint import load_checkpoint, save_checkpoint
from dtpipe.pipeline.cli.main import main
from parts.extractions import Extract

SMALL = ["--student", "test_resnet", "--epochs", "2", "--batch-size", "4", "--device", "cpu", "--json"]
SETTINGS = ["-s", "extract.batch_size=4", "-s", "distill.regressor.width=8"]


def distill(*words: object) -> dict[str, object]:
    done = CliRunner().invoke(main, ["distill", *map(str, words), *SMALL, *SETTINGS])
    assert done.exit_code == 0, done.output
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def stop_after_first_epoch(run: Path) -> None:
    (run / "last.pt").unlink()
    (run / "last.pt").hardlink_to(next(run.glob("checkpoints/*1.pt")))


def begin_unflipped(run: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """As a version did that flipped only what it found flipped, and whose checkpoints did not say so."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_decided", lambda config, *_: module.with_timed_heads(config, False))
        assert not distill(*words, "--out", run)["flips"]
    stop_after_first_epoch(run)
    state = load_checkpoint(run / "last.pt", "distill")
    save_checkpoint(run / "last.pt", "distill", {name: value for name, value in state.items() if name != "flips"})


def test_a_live_teacher_of_images_encodes_flips_unless_the_run_began_without(
    image_folder: Path, ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--images", image_folder, "--teacher", ddpm]
    run = tmp_path / "run"
    assert distill(*words, "--out", run)["flips"]
    stop_after_first_epoch(run)
    resumed = distill(*words, "--out", run)
    assert (resumed["flips"], resumed["resumed_step"]) == (True, 2)
    begin_unflipped(tmp_path / "old", monkeypatch, *words)
    resumed = distill(*words, "--out", tmp_path / "old")
    assert (resumed["flips"], resumed["resumed_step"]) == (False, 2)


def test_flips_need_a_teacher_that_encodes_every_image(extract: Extract, gan: dict[str, str], tmp_path: Path) -> None:
    url = extract("features")
    assert distill(url, "--reencode", 1, "--out", tmp_path / "whole")["flips"]
    assert not distill(url, "--reencode", 0.5, "--out", tmp_path / "half")["flips"]
    kind = f"extract.teacher.kind={gan['kind']}"
    made = ["--num-samples", 8, "--teacher", gan["path"], "-s", kind, "--out", tmp_path / "gan"]
    assert not distill(*made)["flips"]


def test_a_live_run_takes_the_teachers_timestep_and_keeps_its_own(
    image_folder: Path, ddpm: Path, tmp_path: Path
) -> None:
    words = ["--images", image_folder, "--teacher", ddpm, "--out", tmp_path]
    silent = [*words[:-1], tmp_path / "new"]
    distill(*silent)
    noise = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["extract"]["noise"]
    assert noise["timesteps"] == [50]
    run = tmp_path / "old"
    distill(*words[:-1], run, "--timesteps", 150)
    stop_after_first_epoch(run)
    assert distill(*words[:-1], run)["resumed_step"] == 2  # as if its default was that once
    assert yaml.safe_load((run / "config.yaml").read_text())["extract"]["noise"]["timesteps"] == [150]
