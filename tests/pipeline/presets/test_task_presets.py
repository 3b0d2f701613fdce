"""Presets of downstream tasks say what is written down of the paper and its recipes, and plan with a tiny student."""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path

import pytest
from click.testing import CliRunner

from dtpipe.distill.downstream.registry import TASKS
from dtpipe.manifests.labels import Class
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.cli.settings import gather, validate
from dtpipe.pipeline.config import EvalConfig
from parts.paper_runs import header
from parts.paper_tasks import PAPER_TASKS, SMALL_TASKS, TASK_ROWS
from parts.paths import REPO
from parts.tuning import write_halves, write_run

NAMES = [*TASK_ROWS, *SMALL_TASKS]


def settings_of(name: str) -> EvalConfig:
    config: EvalConfig = validate(gather([name], {}, {"eval.checkpoint": "run", "eval.images": "images"}), "eval")
    return config


@pytest.mark.parametrize("name", TASK_ROWS)
def test_settings_are_the_recipes(name: str) -> None:
    config, row = settings_of(name), TASK_ROWS[name]
    found = {key: reduce(getattr, key.split("."), config) for key in row}
    for key, value in row.items():
        assert found[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


def test_the_table_of_rows_names_each_preset_of_the_paper_under_its_task() -> None:
    page = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.partition("## The rows of downstream tasks\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[3] for line in section.splitlines() if line.startswith("| ") and "`:" in line]
    named = {preset: cell.split("`")[1] for cell in cells for preset in re.findall(r"`(\w+)`", cell.partition(":")[2])}
    assert named == {name: settings_of(name).task for name in named} and set(PAPER_TASKS) <= set(named)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_rows_quote_the_papers_figure(name: str) -> None:
    assert f"Paper: {PAPER_TASKS[name]}." in " ".join(header(name))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_halves(tmp_path_factory.mktemp("classes"), 8)


@pytest.mark.parametrize("name", [name for name in NAMES if TASKS[settings_of(name).task].target is Class])
def test_every_preset_of_classes_plans(name: str, run: Path, classes: Path) -> None:
    task = settings_of(name).task
    words = ["eval", str(run), task, "-c", name, "--images", str(classes), "--device", "cpu", "-n", "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert (plan["task"], plan["arms"]) == (task, ["distilled", "random initialisation"])
    assert plan["seconds"] > 0 and plan["memory_bytes"] > 0 and plan["num_trainings"] >= 2
