"""R² in a run's log, and runs that whiten by the dataset: one process, two, killed, stored and live alike."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill import trainer as module
from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.data import OpenedData, open_data
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.statistics import TARGETS_FILE, run_whitener
from dtpipe.distill.stream.stream import FeatureStream
from dtpipe.manifests.errors import StoppedError
from dtpipe.manifests.schema import ViewSpec
from parts.memory import PX, MemorySource, tiny_config, write_dataset
from parts.ranks import fork_ranks
from parts.runs import WITHOUT_BATCH_NORM, assert_equal_checkpoints, losses, train_on
from parts.settings import changed

VIEWS = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=0, timestep=150))
R2_NAMES = [f"r2/{name}" for name in ("l2", "l3", "l4")]


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    """19 good rows at two timesteps, in batches of 8 with a tail of 3; targets standardised by the dataset."""
    url = write_dataset(tmp_path / "features", MemorySource(views=VIEWS))
    return tiny_config(tmp_path / "one", datasets=(str(url),), loss={"whiten": "dataset"}, **WITHOUT_BATCH_NORM)


def r2s(config: DistillConfig) -> list[list[float]]:
    return [[line[name] for name in R2_NAMES] for line in read_metrics(Path(config.run.out))]


def test_r2_is_logged_of_the_samples_since_the_line_before(tmp_path):
    """Nothing is learned, so that f_r of each step is known; against float64, where each step weighs the same."""
    data = OpenedData(MemorySource(), (PX, PX), "0" * 64)
    config = tiny_config(tmp_path, epochs=1, lr=1e-30, log_every=3, **{"weight_decay": 0.0, "warmup_steps": 0})
    train_on(data, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trainer = module.Distillation(config, data, torch.device("cpu"))
    whitener = run_whitener(tmp_path, "layer")
    sums = np.zeros(2)
    for batch in trainer.batches(0):
        with module.norms_for(trainer.model, batch.smallest), torch.no_grad():
            regressed = trainer.network(module.student_images(batch.images, (PX, PX)))["l3"].double()
        white = whitener("l3", batch.levels["l3"]).double()
        mean = torch.from_numpy(all_white(data.source).mean(axis=(0, 2, 3)))[:, None, None]
        sums += [batch.weight * difference.square().mean().item() for difference in (regressed - white, white - mean)]
    (line,) = read_metrics(tmp_path)
    assert line["r2/l3"] == pytest.approx(1 - sums[0] / sums[1], abs=1e-5)  # float32
    assert set(R2_NAMES) < set(line) and not [name for name in line if name.startswith("spread")]


def all_white(source: MemorySource) -> np.ndarray:
    (level,) = (level for level in source.levels if level.name == "l3")
    values = np.stack([source.features(level, row) for row in source.columns.ok_rows]).astype(np.float64)
    over = {"axis": (1, 2, 3), "keepdims": True}
    return (values - values.mean(**over)) / np.sqrt(values.var(**over) + 1e-5)


def test_a_killed_run_that_whitens_by_the_dataset_goes_on_bit_for_bit(config, tmp_path):
    module.train(config)
    broken = changed(config, out=str(tmp_path / "broken"))
    with pytest.raises(StoppedError):
        module.train(broken, on_progress=lambda now: os.kill(os.getpid(), signal.SIGTERM) if now.step == 4 else None)
    assert module.train(broken).resumed_step == 4
    assert_equal_checkpoints(tmp_path / "one" / "last.pt", tmp_path / "broken" / "last.pt")
    assert r2s(config) == r2s(broken)
    (tmp_path / "broken" / TARGETS_FILE).unlink()
    module.train(broken)  # finished, and what it whitens by is there again
    assert (tmp_path / "broken" / TARGETS_FILE).read_bytes() == (tmp_path / "one" / TARGETS_FILE).read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes")
def test_two_processes_log_the_losses_and_r2_of_one(config, tmp_path):
    module.train(config)
    two = changed(config, out=str(tmp_path / "two"))
    assert fork_ranks(lambda _rank: module.train(two).step, tmp_path, 2) == [6, 6]
    np.testing.assert_allclose(losses(two), losses(config), rtol=0, atol=1e-5)
    np.testing.assert_allclose(r2s(two), r2s(config), rtol=0, atol=1e-5)


def test_what_a_batch_is_whitened_to_has_the_moments_of_the_dataset(config):
    """All samples of many epochs, at both views: mean 0 and variance 1 of each channel."""
    data = open_data(config)
    module.train(changed(config, epochs=1))
    whitener = run_whitener(Path(config.run.out), "dataset")
    stream = FeatureStream(data.source, module.stream_settings(changed(config, epochs=8), ("l2",)), torch.device("cpu"))
    batches = stream.batches(StreamPosition())
    white = torch.cat([whitener("l2", batch.levels["l2"]) for batch in batches])
    torch.testing.assert_close(white.mean(dim=(0, 2, 3)), torch.zeros(6), rtol=0, atol=0.03)
    torch.testing.assert_close(white.var(dim=(0, 2, 3)), torch.ones(6), rtol=0, atol=0.03)
