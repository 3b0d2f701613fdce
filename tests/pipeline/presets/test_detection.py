"""Presets of detection plan, at a size that a test has time for, and the small ones run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dtpipe.distill.student.student import StudentSpec
from dtpipe.pipeline.cli.main import main
from parts.objects import write_scenes_as_coco
from parts.paper_detection import DETECTION_ROWS, SMALL_DETECTION
from parts.tuning import write_run

LAYOUTS = {"detect": "coco", "panoptic": "coco-panoptic"}
TINY = {
    **{"eval.tune.head.width": "16", "eval.tune.head.samples": "8", "eval.tune.augment.short_px": "[64]"},
    **{"eval.tune.augment.long_px": "64", "eval.tune.inference.short_px": "64", "eval.tune.batch_size": "2"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), spec=StudentSpec("test_resnet", 4, (64, 64)))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes_as_coco(tmp_path_factory.mktemp("coco"), 6)


def words(run: Path, coco: Path, name: str, **settings: str) -> list[str]:
    task = DETECTION_ROWS[name]["task"] if name in DETECTION_ROWS else name.removesuffix("_small")
    changed = [word for key, value in {**TINY, **settings}.items() for word in ("-s", f"{key}={value}")]
    images = f"{LAYOUTS[task]}:{coco}@train2017"
    return ["eval", str(run), task, "-c", name, "--images", images, "--device", "cpu", "--json", *changed]


@pytest.mark.parametrize("name", [*DETECTION_ROWS, *SMALL_DETECTION])
def test_every_preset_plans(name: str, run: Path, coco: Path) -> None:
    done = CliRunner().invoke(main, [*words(run, coco, name), "-n"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["arms"] == ["distilled", "random initialisation"] and plan["seconds"] > 0


@pytest.mark.parametrize("name", SMALL_DETECTION)
def test_small_presets_run_from_files_to_a_table(name: str, run: Path, coco: Path, tmp_path: Path) -> None:
    settings = {"eval.tune.steps": "1", "eval.tune.lr_grid": "[]", "eval.seeds": "1", "eval.labelled": "[3]"}
    done = CliRunner().invoke(main, [*words(run, coco, name, **settings), "--out", str(tmp_path / "scores.json")])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)["scores"]
    assert [score["extractor"] for score in scores] == ["distilled", "random initialisation"]
    assert all(0 <= score["value"] <= 1 for score in scores)
