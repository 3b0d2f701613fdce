"""The command `export`: what it prints for a layout, and the exit codes of what can go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dtpipe.distill.export.registry import EXPORTS
from dtpipe.pipeline.cli.main import main
from parts.memory import write_student


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("run") / "last.pt", "test_resnet")


def test_a_layout_is_written_and_its_code_printed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("export", checkpoint, "--out", out, "--layout", "transformers")
    assert result.exit_code == 0, result.output
    assert "loaded again; largest difference" in result.stdout
    assert "to load it:" in result.stdout and "AutoBackbone.from_config" in result.stdout
    assert "to fine-tune it on five classes:" in result.stdout and "UperNetForSemanticSegmentation" in result.stdout
    assert {path.name for path in out.iterdir()} == {"config.json", "export.yaml", "model.safetensors", "student.json"}
    again = run("export", checkpoint, "--out", out, "--layout", "transformers", "--json")
    assert json.loads(again.stdout)["layout"] == "transformers"


def test_every_layout_is_listed() -> None:
    result = run("list", "exports")
    assert all(f"{name} " in result.stdout for name in EXPORTS)


@pytest.mark.parametrize(
    ("layout", "code", "words"),
    [
        ("keras", 2, "choose one of timm, torchvision"),
        ("detectron2", 2, "no detectron2 counterpart"),
        ("timm", 10, "differs from the student by"),
    ],
)
def test_what_cannot_be_exported_has_an_exit_code_of_its_own(
    layout: str, code: int, words: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "timm":
        broken = vars(EXPORTS["timm"]) | {"rename": lambda name, weight, _student: (name, weight * 2)}
        monkeypatch.setitem(EXPORTS, "timm", type(EXPORTS["timm"])(**broken))
    result = run("export", checkpoint, "--out", tmp_path / "out", "--layout", layout)
    assert result.exit_code == code
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_head_and_a_layout_do_not_go_together(checkpoint: Path, tmp_path: Path) -> None:
    result = run("export", checkpoint, "--out", tmp_path / "out", "--head", "--layout", "onnx")
    assert result.exit_code == 2 and "a predictor has no layout" in result.stderr
    result = run("export", checkpoint, "--out", tmp_path / "out", "--head")
    assert result.exit_code == 3 and "the run has no decoder of soft labels, so no head to export" in result.stderr
    assert not (tmp_path / "out").exists()
