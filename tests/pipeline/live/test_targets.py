"""Targets of several timesteps, standardised by the dataset: as a user trains on them, stored, live and of a GAN."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.statistics import TARGETS_FILE
from dtpipe.distill.student.timed import has_timed_heads
from dtpipe.pipeline.cli.main import main
from parts.extractions import Extract

TIMESTEPS = ["--timesteps", "50,250"]


def distill(out: Path, *args: object) -> str:
    command = ["distill", *map(str, args), "--out", str(out), "--student", "test_resnet", "--epochs", "1"]
    settings = ["distill.regressor.width=8", "distill.loss.whiten=dataset", "distill.run.log_every=1"]
    command += ["--batch-size", "4", "--device", "cpu", *(word for setting in settings for word in ("-s", setting))]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return result.stdout


def moments(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of each channel, by level."""
    levels: dict[str, Any] = json.loads((run / TARGETS_FILE).read_text())["levels"]
    return {name: (np.array(of["mean"]), np.sqrt(np.array(of["squares"]) / of["num"])) for name, of in levels.items()}


def assert_fits_are_logged(run: Path, levels: Sequence[str] = ("l2", "l3")) -> None:
    lines = read_metrics(run)
    assert lines and all(np.isfinite(line[f"r2/{name}"]) for line in lines for name in levels)


def test_stored_and_live_targets_have_one_mean_and_variance(
    image_folder: Path, ddpm: Path, extract: Extract, tmp_path: Path
) -> None:
    """Draw 0 is that which a dataset of one draw stores, and the first of a live teacher."""
    stored, live = tmp_path / "stored", tmp_path / "live"
    url = extract("features", noise={"timesteps": (50, 250)})
    said = distill(stored, url), distill(live, "--images", image_folder, "--teacher", ddpm, *TIMESTEPS)
    for run, stdout in zip((stored, live), said, strict=True):
        assert "R2" in stdout
        assert has_timed_heads(load_checkpoint(run / "last.pt", "distill")["regressor"])
        assert_fits_are_logged(run)
    ours = moments(live)
    for name, (mean, deviation) in moments(stored).items():
        np.testing.assert_allclose(ours[name][0], mean, atol=2e-3 * deviation.max())  # stored as float16
        np.testing.assert_allclose(ours[name][1], deviation, rtol=2e-3)
    page = CliRunner().invoke(main, ["report", str(stored), str(live)])
    assert page.exit_code == 0, page.output
    html = (stored / "comparison.html").read_text()
    assert "R² of l3" in html and "left out" not in html


@pytest.mark.usefixtures("gan")
def test_targets_of_a_gan_are_standardised_by_images_that_it_makes(gan: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill(run, "--num-samples", 6, "--teacher", gan["path"], "-s", f"extract.teacher.kind={gan['kind']}")
    levels = moments(run)
    assert_fits_are_logged(run, list(levels))
    assert all((deviation > 0).any() for _, deviation in levels.values())


def test_a_plan_times_heads_that_know_the_timestep(image_folder: Path, ddpm: Path, tmp_path: Path) -> None:
    command = ["distill", "--images", str(image_folder), "--teacher", str(ddpm), "--out", str(tmp_path / "run"), "-n"]
    command += ["--student", "test_resnet", "-s", "distill.loss.whiten=dataset", "--json", "--device", "cpu"]
    command += ["-s", "distill.regressor.width=8", "--batch-size", "4"]
    sizes = []
    for timesteps in (["--timesteps", "50"], TIMESTEPS):
        result = CliRunner().invoke(main, [*command, *timesteps])
        assert result.exit_code == 0, result.output
        sizes.append(json.loads(result.stdout)["regressor_parameters"])
    per_level = 64 * 128 + 128 + 128 * 16 + 16  # two layers: 64 waves, 128 hidden, scale and shift of 8 channels
    assert sizes[1] - sizes[0] == 2 * per_level
    assert not (tmp_path / "run").exists()
