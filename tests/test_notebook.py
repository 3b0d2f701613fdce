"""The notebook runs from top to bottom, on a few images, and its cells show what they say."""

from __future__ import annotations

import ast
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from parts.paths import REPO

FILE = REPO / "examples" / "notebook.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
SMALL = 'num_images, batch_size, epochs, student = 16, 8, 1, "test_resnet"'


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """What a cell shows: the value of its last line where that is an expression, as a kernel takes it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last is not None else None


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown: list[Any] = []
    printed = StringIO()
    with redirect_stdout(printed):
        for cell in (cell for cell in CELLS if cell["cell_type"] == "code"):
            small = "parameters" in cell["metadata"].get("tags", ())
            shown.append(run_cell(SMALL if small else "".join(cell["source"]), names))
    assert shown[2][1] == 16 and len(names["dataset"]) == 16
    assert any(hasattr(value, "_repr_png_") for value in shown)  # the picture
    assert names["batch"]["levels"]["l3"].shape[0] == 8
    assert set(names["run"].losses) >= {"loss", "r2/l3"}
    assert "random initialisation" in printed.getvalue() and "teacher" in printed.getvalue()
    assert [shape[0] for shape in shown[-1]] == [1] * len(shown[-1])


def test_the_notebook_is_stored_without_outputs_and_with_ids() -> None:
    document = json.loads(FILE.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4 and len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in CELLS)
