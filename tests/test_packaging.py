"""The wheel holds every package and every file that a command reads at run time."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from parts.paths import REPO

FOLDERS = ("manifests", "extract", "distill", "pipeline")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the tracked and new files, so that build leftovers cannot help."""
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
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _wanted(path: Path) -> bool:
    return path.is_file() and not {".venv", "build", "__pycache__", ".git"} & set(path.relative_to(REPO).parts)


def package_folders() -> list[Path]:
    return sorted(path.parent.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("__init__.py"))


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(f"dtpipe.{'.'.join(folder.parts)}" for folder in package_folders())


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {path.parent.relative_to(REPO) for folder in FOLDERS for path in (REPO / folder).rglob("*.py")}
    assert sorted(folders) == package_folders()


def test_wheel_holds_every_module(wheel_names: set[str]) -> None:
    modules = {
        f"dtpipe/{path.relative_to(REPO)}" for folder in package_folders() for path in (REPO / folder).glob("*.py")
    }
    assert modules - wheel_names == set()


def test_wheel_holds_the_data_that_commands_read(wheel_names: set[str]) -> None:
    folders = ("pipeline/presets", "pipeline/report/templates", "pipeline/demo/teacher")
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
    data |= {f"dtpipe/{folder}/py.typed" for folder in FOLDERS}  # annotations are for users' type checkers too
    assert data - wheel_names == set()


def test_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dtpipe"}
