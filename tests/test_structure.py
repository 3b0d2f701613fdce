"""What holds the house together: one place for each thing that there should be one of."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from dtpipe.manifests import errors
from parts.paths import REPO

PACKAGES = ("manifests", "extract", "distill", "pipeline")
TREES = {
    str(path.relative_to(REPO)): ast.parse(path.read_text())
    for package in PACKAGES
    for path in sorted((REPO / package).rglob("*.py"))
}

ERRORS = "manifests/errors.py"
CONTROL_FLOW = {  # exceptions that are caught where they are raised for, and reach no user
    "extract/shards/worker.py: ShardDroppedError",
    "extract/teachers/taps.py: _LastTapReachedError",
}
RENAMES = "manifests/store/publish.py"
_RENAMING = {"rename", "renames", "replace"}


def exceptions(tree: ast.AST) -> list[str]:
    """Names of the classes that are exceptions by the names of their bases."""
    known = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if (name := ast.unparse(base).split(".")[-1]) in known or name.endswith(("Error", "Exception"))
    ]


def renames(tree: ast.AST) -> list[int]:
    """Lines that rename files: `os.replace(..)`, `shutil.move(..)`, or `.replace(path)` and `.rename(path)` of one argument."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            ast.unparse(node.func) in {"os.rename", "os.renames", "os.replace", "shutil.move"}
            or (node.func.attr in _RENAMING and len(node.args) + len(node.keywords) == 1)
        )
    ]


def test_errors_live_in_one_file() -> None:
    elsewhere = {f"{file}: {name}" for file, tree in TREES.items() if file != ERRORS for name in exceptions(tree)}
    assert elsewhere == CONTROL_FLOW


def test_the_docstring_of_errors_is_their_tree() -> None:
    """Classes in its order, each with its parent and exit code; `*` stands for one that is set where it is raised."""
    listed, parents = [], ["Exception"]
    for line in (inspect.getdoc(errors) or "").splitlines():
        if match := re.fullmatch(
            r"((?:│   |    |├── |└── )*)(\w+Error|BadImage) +(\d|\*)?.*", line.removeprefix("    ")
        ):
            prefix, name, code = match.groups()
            depth = len(prefix) // 4
            parents[depth + 1 :] = [name]
            listed.append((name, parents[depth], getattr(errors, name).exit_code if code in (None, "*") else int(code)))
    classes = [node for node in TREES[ERRORS].body if isinstance(node, ast.ClassDef)]
    actual = [(node.name, ast.unparse(node.bases[0]), getattr(errors, node.name).exit_code) for node in classes]
    assert sorted(listed) == sorted(actual)


def test_files_are_renamed_in_one_file() -> None:
    assert {file: lines for file, tree in TREES.items() if file != RENAMES and (lines := renames(tree))} == {}
    assert renames(TREES[RENAMES])


@pytest.mark.parametrize(
    ("find", "source"),
    [
        (exceptions, "class TooLateError(DtpipeError): ..."),
        (exceptions, "def f():\n    class Odd(errors.BadImage): ..."),
        (renames, "os.replace(one, other)"),
        (renames, "Path('a').with_name('b').replace(path)"),
        (renames, "def f(): old.rename(target=new)"),
    ],
)
def test_what_is_out_of_place_is_found(find, source) -> None:
    assert find(ast.parse(source))
