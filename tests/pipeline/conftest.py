"""Tiny teachers of the real families, and small extractions with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers import base
from dtpipe.extract.teachers.base import TeacherKind, register_teacher
from parts.extractions import Extract, TinyGan, write_ddpm


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny diffusion teacher."""
    return write_ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="session")
def other_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return write_ddpm(tmp_path_factory.mktemp("other-ddpm"), seed=1)


@pytest.fixture
def extract(ddpm: Path, image_folder: Path, tmp_path: Path) -> Extract:
    """Extract eight images with the tiny teacher in this process; keyword arguments replace settings. Returns the URL."""

    def run(name: str, **changes: Any) -> str:
        fields = {
            "images": str(image_folder),
            "out": str(tmp_path / name),
            "teacher": {"path": str(ddpm)},
            "noise": {"timesteps": [50]},
            "shard": {"samples": 3},
            "batch_size": 3,
            "inline": True,
            "device": "cpu",
        }
        return run_extraction(ExtractConfig.model_validate({**fields, **changes})).url

    return run


@pytest.fixture
def gan() -> Iterator[dict[str, str]]:
    """The settings of a GAN teacher whose family is known during one test."""
    register_teacher(TeacherKind("tiny_gan", "nothing", lambda path: False, lambda config, device: TinyGan()))
    yield {"path": "tiny", "kind": "tiny_gan"}
    del base._KINDS["tiny_gan"]
