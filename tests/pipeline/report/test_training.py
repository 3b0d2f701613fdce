"""Curves of a run: losses as they were written, and R² against the mean of the teacher's levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.pipeline.report.maps.features import level_variances, variances_of
from dtpipe.pipeline.report.training import level_lines, read_run_config, training_section


def whitened(url: str, name: str) -> np.ndarray:
    """In float64, by hand. Shapes: -> (N, C, h, w)."""
    dataset = FeatureDataset.open(url)
    level = np.stack([read_level(dataset, name, row) for row in dataset.columns.ok_rows]).astype(np.float64)
    return (level - level.mean(axis=(1, 2, 3), keepdims=True)) / level.std(axis=(1, 2, 3), keepdims=True)


def test_variances_are_those_of_the_whitened_levels_around_their_mean(small_run: Path) -> None:
    config = read_run_config(small_run)
    found = level_variances(small_run, config, num_images=100, seed=0)
    assert sorted(found) == ["l2", "l3"]
    for name, variance in found.items():
        expected = whitened(config.datasets[0], name).var(axis=0, ddof=1).mean()
        assert variance == pytest.approx(expected, rel=1e-4)  # float16 levels are whitened in float32


def test_r2_is_one_minus_error_over_variance(small_run: Path) -> None:
    metrics = read_metrics(small_run)
    lines = level_lines(metrics, {"l2": 0.5, "l3": 0.8})
    assert list(lines) == ["R² by level"]
    steps, values = lines["R² by level"]["l3"]
    assert list(steps) == [line["step"] for line in metrics]
    assert values == pytest.approx([1 - line["mse/l3"] / 0.8 for line in metrics])


def test_without_variances_the_errors_are_drawn(small_run: Path) -> None:
    metrics = read_metrics(small_run)
    lines = level_lines(metrics, {"l2": 0.5})
    assert lines["squared error by level"]["l2"][1] == [line["mse/l2"] for line in metrics]
    (section,) = training_section(metrics, {})
    assert "R²" not in section.html and "squared error by level" in section.html


def test_one_image_and_lost_data_have_no_variances(small_run: Path, tmp_path: Path) -> None:
    config = read_run_config(small_run)
    assert level_variances(small_run, config, num_images=1, seed=0) == {}
    gone = config.model_copy(update={"datasets": (str(tmp_path / "gone"),)})
    assert variances_of(small_run, gone, 8, 0) == {}
