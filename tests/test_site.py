"""The site of the documents is built as `make docs` builds it, and no link, anchor or page is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dtpipe
from parts.paths import REPO

RECIPE = re.search(r"^\t\$\(BIN\)/python (-m sphinx .*) build/site$", (REPO / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; the build fails at the first warning: a lost link or anchor, a page that the navigation lacks."""
    assert RECIPE is not None
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(REPO / ".dev")}
    command = [sys.executable, *RECIPE[1].split(), str(out)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out


def test_every_document_is_a_page_and_the_first_is_where_browsers_look(site: Path) -> None:
    documents = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), REPO / "manifests" / "README.md"]
    names = [path.relative_to(REPO).with_suffix(".html") for path in documents]
    assert len(names) > 15
    assert [name for name in names if not (site / name).is_file()] == []
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()


def test_every_public_name_is_on_the_page_of_functions(site: Path) -> None:
    page = (site / "docs" / "api.html").read_text()
    names = set(re.findall(r'<span class="sig-name descname"><span class="pre">(\w+)</span>', page))
    assert names | {"Sample"} >= set(dtpipe.__all__) - {"__version__"}
    assert dtpipe.Sample.__name__ in names


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    page = (site / "docs" / "datasets.html").read_text()
    assert re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))', page) == []
