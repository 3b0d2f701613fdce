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


@pytest.fixture(scope="session")
def other_run(small_run: Path) -> Path:
    """Another run on the same dataset, with another rate."""
    from dtpipe.distill.trainer import train
    from dtpipe.pipeline.report.training import read_run_config

    datasets = read_run_config(small_run).datasets
    out = small_run.with_name("other")
    train(tiny_config(out, datasets=datasets, epochs=1, log_every=1, lr=2e-3))
    return out
