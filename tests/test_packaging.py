"""The wheel holds every package and every file that a command reads at run time."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from parts.paths import REPO

BESIDE_TORCH = {"triton"}
"""What torch's build for GPUs brings in the one version that fits it; nobody else may name one."""

FOLDERS = ("manifests", "extract", "distill", "pipeline")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked and new files, so that build leftovers cannot help."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.splitlines() or [str(path.relative_to(REPO)) for path in REPO.rglob("*") if _wanted(path)]
    for name in names:
        source, target = REPO / name, copy / name
        if source.is_file() and not source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as pip lays it down, where nothing else of dtpipe is in reach."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_installed(site: Path, folder: Path, *words: str) -> str:
    """What Python says in a folder, of the installed package and the shared ones."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def _wanted(path: Path) -> bool:
    return path.is_file() and not {".venv", "build", "__pycache__", ".git"} & set(path.relative_to(REPO).parts)


def package_folders() -> list[Path]:
    return sorted(path.parent.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("__init__.py"))


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(["dtpipe", *(f"dtpipe.{'.'.join(folder.parts)}" for folder in package_folders())])


def imported_packages(source: str, at_import: bool = False) -> set[str]:
    """Packages of others that a module imports anywhere, or (`at_import`) as soon as it is imported itself."""
    names: set[str] = set()
    for node in _nodes(ast.parse(source), at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dtpipe"}


def _nodes(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if at_import and isinstance(child, ast.FunctionDef | ast.If):  # `if TYPE_CHECKING:`
            continue
        yield child
        yield from _nodes(child, at_import)


def requirements(*extras: str) -> set[str]:
    """Normal names of the distributions that pyproject asks for, its own extras within extras followed."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    names: set[str] = set()
    for line in (line for extra in extras for line in project["optional-dependencies"][extra]):
        own = re.match(r"dtpipe\[(.*)\]", line)
        names |= requirements(*own[1].split(",")) if own else {_distribution(line)}
    names |= {_distribution(line) for line in project["dependencies"]}
    return names | (BESIDE_TORCH & {_distribution(line) for line in requires("torch") or ()})


def _distribution(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def undeclared(source: str, declared: set[str], at_import: bool = False) -> set[str]:
    """Packages that a module imports and none of the declared distributions brings by itself."""
    return {name for name in imported_packages(source, at_import) if not declared & brought_by(name)}


@cache
def _installed() -> Mapping[str, list[str]]:
    return packages_distributions()  # half a second


def brought_by(package: str) -> set[str]:
    """Distributions that may bring a package; its own name where it is not installed."""
    return {_distribution(name) for name in _installed().get(package, [package])}


def test_every_package_that_is_imported_is_declared() -> None:
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for_users = requirements(*(extra for extra in extras if extra not in ("dev", "docs")))
    found: dict[str, set[str]] = {}
    for path in (path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")):
        source = path.read_text()
        found[str(path.relative_to(REPO))] = undeclared(source, for_users) | undeclared(source, requirements(), True)
    assert {file: names for file, names in found.items() if names} == {}


def test_what_tests_and_benchmarks_import_is_declared_for_developers() -> None:
    files = [path for folder in ("tests", "benchmarks") for path in (REPO / folder).rglob("*.py")]
    ours = {"parts", *(path.stem for path in files)}
    peers = {"imagecodecs", "litdata", "streaming"}  # that benchmarks compare with, each where it is installed
    declared = requirements("dev")
    assert {path: names for path in files if (names := undeclared(path.read_text(), declared) - ours - peers)} == {}


@pytest.mark.parametrize(
    "source", ["import yaml", "def f():\n    from huggingface_hub.utils import x", "import nobodys"]
)
def test_an_import_that_is_not_declared_is_found(source: str) -> None:
    assert undeclared(source, {"torch"}) and not undeclared(source, {"pyyaml", "huggingface-hub", "nobodys"})


def test_an_optional_package_is_not_needed_to_import_a_module() -> None:
    assert undeclared("def f():\n    import lmdb", requirements(), at_import=True) == set()
    assert undeclared("import lmdb", requirements(), at_import=True) == {"lmdb"}
    assert undeclared("import lmdb", requirements("lmdb"), at_import=True) == set()


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {path.parent.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("*.py")}
    assert sorted(folders) == package_folders()


def test_wheel_holds_every_module(wheel_names: set[str]) -> None:
    modules = {
        f"dtpipe/{path.relative_to(REPO)}" for folder in package_folders() for path in (REPO / folder).glob("*.py")
    }
    assert modules - wheel_names == set()


def test_wheel_holds_the_data_that_commands_read(wheel_names: set[str]) -> None:
    folders = ("pipeline/presets", "pipeline/report/templates", "pipeline/demo/teacher", "pipeline/init/templates")
    data = {
        f"dtpipe/{path.relative_to(REPO)}"
        for folder in folders
        for path in (REPO / folder).rglob("*")
        if path.is_file()
    }
    assert any(name.endswith(".yaml") for name in data)
    assert any(name.endswith(".html") for name in data)
    assert any(name.endswith(".safetensors") for name in data)
    data |= {"dtpipe/distill/student/timm_students.json", "dtpipe/extract/teachers/published.yaml"}
    data |= {f"dtpipe/extract/sources/layouts/published/{name}" for name in ("classes.yaml", "imagenet.tsv")}
    data |= {f"dtpipe/{folder}/py.typed" for folder in FOLDERS}  # annotations are for users' type checkers too
    assert data - wheel_names == set()


def test_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    """The package is mapped to the whole folder, with its tests, documents and benchmarks: none of these come along."""
    of_packages = tuple(f"dtpipe/{folder}/" for folder in FOLDERS)
    others = {name for name in wheel_names if not name.startswith(of_packages) and ".dist-info/" not in name}
    assert others == {"dtpipe/__init__.py", "dtpipe/__main__.py", "dtpipe/py.typed"}


def test_a_folder_named_dtpipe_where_one_works_hides_nothing(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "dtpipe" / "manifests").mkdir(parents=True)
    code = "import dtpipe, dtpipe.manifests.schema; print(dtpipe.__file__); print(dtpipe.manifests.__file__)"
    files = run_installed(installed, tmp_path, "-c", code).split()
    assert files == [str(installed / "dtpipe" / name) for name in ("__init__.py", "manifests/__init__.py")]
    assert run_installed(installed, tmp_path, "-m", "dtpipe", "--help").startswith("Usage: dtpipe [OPTIONS]")


def test_an_installed_dtpipe_finds_its_presets_templates_and_teacher(installed: Path, tmp_path: Path) -> None:
    flags = ["--images", "a", "--teacher", "adm-imagenet", "--student", "resnet18", "--no-plan"]
    run_installed(installed, tmp_path, "-m", "dtpipe", "init", "project", *flags)
    assert (tmp_path / "project" / "slurm.sh").is_file()
    assert "imagenet_r50" in run_installed(installed, tmp_path, "-m", "dtpipe", "list", "presets")
    code = "from dtpipe.pipeline.demo.run import shipped_teacher as t; print((t() / 'model_index.json').is_file())"
    assert run_installed(installed, tmp_path, "-c", code) == "True\n"


def test_the_constraints_pin_every_requirement_to_a_version_it_allows() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        if requirement.name != "dtpipe":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
