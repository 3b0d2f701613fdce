"""Timesteps of views and of the samples of a batch, stored, joined, mismatched and live."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtpipe.distill.stream.live import LiveSamples
from dtpipe.distill.stream.mismatched import MismatchedPairs
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.stream import FeatureStream, StreamSettings
from dtpipe.distill.stream.timesteps import several_timesteps, view_timesteps
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import JoinedDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import ViewSpec
from parts.memory import MemorySource, level_spec, write_dataset

CPU = torch.device("cpu")
STEPS = (50, 150, 250)
VIEWS = tuple(ViewSpec(draw=0, timestep=step) for step in STEPS)


class TellingTeacher:
    """Live levels that hold the timestep they were encoded at."""

    makes_images = False

    def __init__(self, source: MemorySource) -> None:
        self.source = source

    def prepare(self, samples: LiveSamples) -> None:
        """Nothing can be done ahead."""

    def encode(self, images: Tensor, samples: LiveSamples, prepared: None) -> tuple[Tensor, Mapping[str, Tensor]]:
        steps = torch.tensor([self.source.views[view].timestep for view in samples.views], dtype=torch.float32)
        shapes = {level.name: (len(samples), level.channels, level.height, level.width) for level in self.source.levels}
        return images, {name: steps[:, None, None, None].expand(shape) for name, shape in shapes.items()}


def stream(source: MemorySource, **changes: object) -> FeatureStream:
    settings = StreamSettings(levels=("l2", "l3"), seed=1, epochs=2, batch_size=8, micro_batch=3, **changes)
    live = TellingTeacher(source) if settings.reencode else None
    return FeatureStream(source, settings, CPU, live)


def test_stored_samples_carry_the_timestep_of_the_view_they_are_read_at():
    source, seen = MemorySource(views=VIEWS), set()
    for batch in stream(source).batches(StreamPosition()):
        for idx, key in enumerate(batch.keys):
            step = int(batch.timesteps["l2"][idx])
            stored = read_level(source, "l3", int(key[-7:-4]), STEPS.index(step))
            assert np.array_equal(batch.levels["l3"][idx].numpy(), stored)
            assert batch.timesteps["l3"][idx] == step
            seen.add(step)
    assert seen == set(STEPS)


def test_live_samples_carry_the_timestep_they_are_encoded_at_beside_stored_ones():
    source, num_live = MemorySource(views=VIEWS), 0
    for batch in stream(source, reencode=0.5).batches(StreamPosition()):
        first = batch.levels["l2"][:, 0, 0, 0]
        live = (batch.levels["l2"] == first[:, None, None, None]).flatten(1).all(dim=1)
        assert torch.equal(batch.timesteps["l2"][live], first[live].long())
        num_live += int(live.sum())
    assert 8 < num_live < 30


def test_views_without_noise_have_timestep_zero_and_are_not_several():
    source = MemorySource(views=(ViewSpec(draw=0), ViewSpec(draw=1)))
    assert view_timesteps(source, "l2") == (0, 0)
    assert not several_timesteps(source, ["l2", "l3"])


def test_levels_joined_side_by_side_have_the_timesteps_of_their_own_dataset(tmp_path: Path):
    one = MemorySource(views=VIEWS[:2])
    same = (ViewSpec(draw=0, timestep=20), ViewSpec(draw=1, timestep=20))
    other = MemorySource(views=same, levels=(level_spec("l2", 4, 5), level_spec("l5", 32, 4)))
    parts = [FeatureDataset.open(str(write_dataset(tmp_path / name, of))) for name, of in (("a", one), ("b", other))]
    joined = JoinedDataset(parts)
    assert view_timesteps(joined, "l2") == (50, 150)
    assert view_timesteps(joined, "l2.b") == view_timesteps(joined, "l5") == (20, 20)
    assert several_timesteps(joined, ["l5", "l2"]) and not several_timesteps(joined, ["l5", "l2.b"])
    mismatched = MismatchedPairs(joined, joined.columns.ok_rows, 0)
    assert view_timesteps(mismatched, "l2.b") == (20, 20)


def test_timesteps_joined_along_the_views_are_several(tmp_path: Path):
    parts = [
        FeatureDataset.open(str(write_dataset(tmp_path / str(view.timestep), MemorySource(views=(view,)))))
        for view in VIEWS
    ]
    joined = JoinedDataset(parts)
    assert joined.along_views
    assert view_timesteps(joined, "l3") == STEPS
    assert several_timesteps(joined, ["l3"])
