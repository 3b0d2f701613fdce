"""A run of a few steps on a dataset of eight images, for pages about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from parts.images import write_images
from parts.memory import tiny_config


@pytest.fixture(scope="session")
def small_run(ddpm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; the tiny diffusion teacher's levels l2 and l3 at 32 px, test_resnet."""
    from dtpipe.distill.trainer import train
    from dtpipe.extract.run import run_extraction
    from parts.extractions import extract_config

    folder = tmp_path_factory.mktemp("small")
    url = run_extraction(extract_config(write_images(folder / "images"), ddpm, folder / "features")).url
    train(tiny_config(folder / "run", datasets=(url,), epochs=1, log_every=1))
    return folder / "run"
