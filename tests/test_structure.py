"""What holds the house together: one place for each thing that there should be one of, and no circle between modules.

Lists called `STILL_..` name what is left to mend; an entry that is mended must go.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtpipe.manifests import errors
from parts.paths import REPO

PACKAGES = ("manifests", "extract", "distill", "pipeline")
FILES = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]
TREES = {str(path.relative_to(REPO)): ast.parse(path.read_text()) for path in FILES}

MAX_MODULES, MAX_LINES = 14, 400
STILL_IN_CIRCLES: list[set[str]] = []
BY_PROTOCOL = {
    ("EXAMPLE", "FLAGS", "HELP", "command"): "pipeline/commands/",
    ("FORMAT", "check", "documents", "finetune", "reload", "sizes", "snippet", "write"): "distill/export/",
    ("CODEC",): "manifests/codecs/",
    ("LOSS",): "distill/losses/",
    ("REGRESSOR",): "distill/student/regressors/",
    ("KIND",): "extract/",
    ("LAYOUT", "LAYOUTS"): "extract/sources/layouts/",
    ("TASK",): "distill/downstream/",
    ("TRACKER",): "distill/engine/trackers/",
}
"""What many files of a folder define, since one reader or caller takes any of them."""

ERRORS = "manifests/errors.py"
CONTROL_FLOW = {  # exceptions that are caught where they are raised for, and reach no user
    "extract/shards/task.py: ShardDroppedError",
    "extract/teachers/taps.py: _LastTapReachedError",
}
RENAMES = "manifests/store/publish.py"
_RENAMING = {"rename", "renames", "replace"}


def imports(tree: ast.AST) -> set[str]:
    """Modules of ours that a tree imports, in functions too, but not for type checkers alone."""
    names: set[str] = set()
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("dtpipe.")}


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _executed(ast.Module(node.orelse, []))
        else:
            yield node
            yield from _executed(node)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules each of which comes to import every other; `graph` is module to what it imports."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(map(set, groups - {frozenset()}), key=sorted)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph.get(ahead.pop(), set()) & graph.keys() - reached
        reached |= new
        ahead += new
    return reached


def public_names(tree: ast.Module) -> set[str]:
    """Functions, classes and constants that a module offers."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return {name for name in names if not name.startswith("_")}


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


def plain_locks(tree: ast.Module) -> set[int]:
    """Lines that make a lock of threads."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {
        node: node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "") for node in calls
    }
    return {node.lineno for node, name in names.items() if name in ("Lock", "RLock")}


def renames(tree: ast.AST) -> list[int]:
    """Lines that rename files: `os.replace(..)`, `shutil.move(..)`, `.replace(path)` or `.rename(path)`."""
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


def test_no_module_comes_to_import_itself() -> None:
    graph = {".".join(Path(file).with_suffix("").parts): imports(tree) for file, tree in TREES.items()}
    graph = {module: {name.removeprefix("dtpipe.") for name in names} for module, names in graph.items()}
    assert sum(map(len, graph.values())) > 500  # imports are seen
    assert circles(graph) == STILL_IN_CIRCLES


def test_folders_and_files_are_no_longer_than_a_reader_can_hold() -> None:
    counts = Counter(str(path.parent.relative_to(REPO)) for path in FILES if path.name != "__init__.py")
    assert [folder for folder, num in counts.items() if num > MAX_MODULES] == []
    assert [file for file in TREES if len((REPO / file).read_text().splitlines()) > MAX_LINES] == []


def test_packages_do_nothing_when_imported() -> None:
    assert [file for file, tree in TREES.items() if file.endswith("__init__.py") and tree.body] == []


def test_no_public_name_is_defined_in_two_modules() -> None:
    protocols = {name: folder for names, folder in BY_PROTOCOL.items() for name in names}
    places: dict[str, list[str]] = {}
    for file, tree in TREES.items():
        for name in public_names(tree):
            if not file.startswith(protocols.get(name, file + "/")):
                places.setdefault(name, []).append(file)
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert twice == {}


def test_errors_live_in_one_file() -> None:
    elsewhere = {f"{file}: {name}" for file, tree in TREES.items() if file != ERRORS for name in exceptions(tree)}
    assert elsewhere == CONTROL_FLOW


def test_the_docstring_of_errors_is_their_tree() -> None:
    """Classes in its order, each with its parent and exit code; `*` stands for one that is set where it is raised."""
    listed, parents = [], ["Exception"]
    for line in (inspect.getdoc(errors) or "").splitlines():
        if match := re.fullmatch(
            r"((?:│   |    |├── |└── )*)(\w+Error|BadImage) +(\d+|\*)?.*", line.removeprefix("    ")
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


def test_what_forked_loaders_read_with_has_no_lock_that_a_fork_keeps() -> None:
    """A thread of the parent may hold it at that moment; `faults` is for tests."""
    folders = ("manifests/store/", "manifests/read/", "manifests/codecs/", "extract/sources/")
    beside = ("manifests/store/open_files.py", "manifests/store/faults.py")
    found = {str(file): lines for file, tree in TREES.items() if (lines := plain_locks(tree))}
    assert {file for file in found if file.startswith(folders)} == set(beside)


@pytest.mark.parametrize(
    ("find", "source"),
    [
        (imports, "if x:\n    def f():\n        from dtpipe.distill import trainer"),
        (imports, "if TYPE_CHECKING: ...\nelse:\n    import dtpipe.extract.run"),
        (public_names, "def f(): ..."),
        (public_names, "_A, (B, _C) = 1, (2, 3)"),
        (public_names, "Alias: type = int"),
        (exceptions, "class TooLateError(DtpipeError): ..."),
        (exceptions, "def f():\n    class Odd(errors.BadImage): ..."),
        (renames, "os.replace(one, other)"),
        (renames, "Path('a').with_name('b').replace(path)"),
        (renames, "def f(): old.rename(target=new)"),
        (plain_locks, "class A:\n    def f(self): self.lock = threading.Lock()"),
        (plain_locks, "LOCK = RLock()"),
    ],
)
def test_what_is_out_of_place_is_found(find, source) -> None:
    assert find(ast.parse(source))


def test_what_only_type_checkers_import_makes_no_circle() -> None:
    assert imports(ast.parse("if TYPE_CHECKING:\n    from dtpipe.distill.trainer import Trainer")) == set()


def test_a_circle_is_found_and_a_diamond_is_none() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}, "e": {"a", "d"}}
    assert circles(graph) == [{"b", "c"}, {"d"}]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
