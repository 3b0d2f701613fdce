"""Fixtures that several folders share; a folder's own stand in its conftest.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small tensors are fastest on one thread
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest

from parts.extractions import Extract, MakeConfig, extract_config
from parts.images import write_images

# A sync takes 10 ms a file on a disk, and no test can see it: a killed process loses nothing of the page cache.
os.fsync = lambda _: None

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def signal_handlers() -> Iterator[None]:
    """As they were: ray.init leaves a handler that turns SIGTERM into SystemExit, also in processes forked later."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Eight 32 px PNG files in two class folders, `cat` and `dog`."""
    return write_images(tmp_path / "images")


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny diffusion teacher of 32 px with levels l2 and l3."""
    from parts.teachers import write_ddpm

    return write_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="session")
def other_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    from parts.teachers import write_ddpm

    return write_ddpm(tmp_path_factory.mktemp("other-ddpm"), seed=1)


@pytest.fixture
def gan(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The settings of a GAN teacher whose family is known during one test."""
    from dtpipe.extract.teachers.registry import KINDS
    from parts.teachers import GAN_KIND

    monkeypatch.setitem(KINDS, GAN_KIND.kind, GAN_KIND)
    return {"path": "tiny", "kind": GAN_KIND.kind}


@pytest.fixture
def make_config(ddpm: Path, image_folder: Path, tmp_path: Path) -> MakeConfig:
    """Settings of an extraction of `image_folder` with the tiny diffusion teacher; keyword arguments replace fields."""
    return lambda **changes: extract_config(image_folder, ddpm, tmp_path / "features", **changes)


@pytest.fixture
def extract(make_config: MakeConfig, tmp_path: Path) -> Extract:
    """Extract into a folder by name, in this process; keyword arguments replace settings. Returns the URL."""
    from dtpipe.extract.run import run_extraction

    def run(name: str = "features", **changes: Any) -> str:
        return run_extraction(make_config(out=str(tmp_path / name), **changes)).url

    return run
