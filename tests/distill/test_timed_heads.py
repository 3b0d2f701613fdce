"""Runs whose targets are of several timesteps: heads that know it fit better, and only such runs have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill import trainer as module
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.progress import TrainProgress
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.student.timed import has_timed_heads
from dtpipe.manifests.schema import LevelSpec, ViewSpec
from parts.memory import PX, MemorySource, level_spec, tiny_config
from parts.runs import assert_equal_checkpoints, train_on
from parts.settings import changed

VIEWS = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=0, timestep=250))


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


@dataclass
class Opposite(MemorySource):
    """All images have one pattern, and the later timestep its negative: their mean says nothing."""

    views: tuple[ViewSpec, ...] = VIEWS
    levels: tuple[LevelSpec, ...] = (level_spec("l3", 8, 6),)

    def features(self, level: LevelSpec, row: int, view: int = 0) -> np.ndarray:
        pattern = np.linspace(-2, 2, level.channels)[:, None, None] * np.ones((1, level.height, level.width))
        return (pattern if view == 0 else -pattern).astype(level.dtype)


def heads_know(folder: Path) -> bool:
    return has_timed_heads(load_checkpoint(folder / "last.pt", "distill")["regressor"])


def opened(source: MemorySource) -> OpenedData:
    return OpenedData(source, (PX, PX), "0" * 64)


def test_a_student_of_targets_that_differ_by_timestep_fits_them_only_with_heads_that_know_it(tmp_path):
    losses = {}
    for timestep in (True, False):
        config = tiny_config(
            tmp_path / str(timestep),
            regressor={"width": 8, "timestep": timestep},
            loss={"at_weight": 0},
            epochs=8,
            lr=2e-2,
            log_every=3,
        )
        train_on(opened(Opposite()), config)
        losses[timestep] = [line["loss"] for line in read_metrics(tmp_path / str(timestep))]
    assert losses[True][-1] < 0.2
    assert losses[False][-1] > 0.8  # the mean of both has 1


@pytest.mark.parametrize(
    ("views", "timestep", "known"),
    [(VIEWS, None, True), (VIEWS[:1], None, False), (VIEWS, False, False), (VIEWS[:1], True, True)],
)
def test_heads_know_the_timestep_where_targets_have_several_unless_settings_say_otherwise(
    tmp_path, views, timestep, known
):
    config = tiny_config(tmp_path, epochs=1, regressor={"width": 8, "timestep": timestep})
    train_on(opened(MemorySource(views=views)), config)
    assert heads_know(tmp_path) == known


def broken_off(config: module.DistillConfig, data: OpenedData, step: int) -> None:
    """Killed a step after a save."""

    def kill(progress: TrainProgress) -> None:
        if progress.step == step + 1:
            raise Killed

    with pytest.raises(Killed):
        train_on(data, config, kill)


def test_a_killed_run_whose_heads_know_the_timestep_goes_on_bit_for_bit(tmp_path):
    data = opened(MemorySource(views=VIEWS))
    config = tiny_config(tmp_path / "whole", log_every=1)
    train_on(data, config)
    broken = changed(config, out=str(tmp_path / "broken"), save_every_s=1e-9)
    broken_off(broken, data, 4)
    assert train_on(data, broken).resumed_step == 4
    assert_equal_checkpoints(tmp_path / "whole" / "last.pt", tmp_path / "broken" / "last.pt")
    assert heads_know(tmp_path / "broken")


def test_a_run_that_began_before_there_were_such_heads_goes_on_without(tmp_path, monkeypatch):
    data = opened(MemorySource(views=VIEWS))
    config = tiny_config(tmp_path, log_every=1, save_every_s=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(module, "several_timesteps", lambda *_: False)
        broken_off(config, data, 4)
    assert train_on(data, config).resumed_step == 4
    assert not heads_know(tmp_path)
    assert torch.isfinite(torch.tensor([line["loss"] for line in read_metrics(tmp_path)])).all()
