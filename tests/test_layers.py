"""Imports point one way: pipeline -> {extract, distill} -> manifests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from parts.paths import REPO

MAY_IMPORT = {
    "manifests": {"manifests"},
    "extract": {"extract", "manifests"},
    "distill": {"distill", "manifests"},
    "pipeline": {"pipeline", "extract", "distill", "manifests"},
}
FILES = sorted(path for folder in MAY_IMPORT for path in (REPO / folder).rglob("*.py"))
HEAVY = {"torch", "torchvision", "ray", "timm", "diffusers", "transformers"}


def imported_modules(tree: ast.AST, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """Absolute names that a module imports, with the line; relative imports come out as '.'."""
    nodes = ast.walk(tree) if not top_level_only else _runs_at_import(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield ".", node.lineno
            else:
                yield node.module or "", node.lineno
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _runs_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside functions and outside `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _runs_at_import(child)


def violations(source: str, folder: str) -> list[str]:
    found = []
    for name, line in imported_modules(ast.parse(source)):
        parts = name.split(".")
        if name == ".":
            found.append(f"line {line}: relative import")
        elif parts[0] in MAY_IMPORT:
            found.append(f"line {line}: {name} without dtpipe. in front")
        elif parts[0] == "dtpipe" and len(parts) > 1 and parts[1] not in MAY_IMPORT[folder]:
            found.append(f"line {line}: {folder} imports {name}")
        elif folder == "manifests" and parts[0] in HEAVY:
            found.append(f"line {line}: manifests imports {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(REPO).parts[0]
    assert violations(path.read_text(), folder) == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("manifests", "import torch"),
        ("manifests", "def f():\n    import ray.util"),
        ("manifests", "from dtpipe.extract import config"),
        ("extract", "from dtpipe.distill.losses.features import mse"),
        ("extract", "from dtpipe import distill"),
        ("distill", "def f():\n    from dtpipe.extract.config import ExtractConfig"),
        ("distill", "from dtpipe.pipeline import cli"),
        ("pipeline", "from . import cli"),
        ("pipeline", "import extract.config"),
    ],
)
def test_a_wrong_import_is_found(folder: str, source: str) -> None:
    assert violations(source, folder)


def test_settings_and_commands_import_nothing_heavy_on_top() -> None:
    light = [REPO / folder / "config.py" for folder in ("extract", "distill", "pipeline")]
    light += [*(REPO / "pipeline").rglob("*.py"), REPO / "extract" / "teachers" / "base.py"]
    heavy = [
        f"{path.relative_to(REPO)}:{line} {name}"
        for path in light
        for name, line in imported_modules(ast.parse(path.read_text()), top_level_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert heavy == []
