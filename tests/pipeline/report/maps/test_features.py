"""What the networks of a run see, for the page about it."""

from __future__ import annotations

import torch

from dtpipe.distill.stream.batch import student_images
from dtpipe.distill.trainer import train
from dtpipe.manifests.read.source import read_image
from dtpipe.manifests.schema import ViewSpec
from dtpipe.pipeline.report.maps.features import RunFeatures
from dtpipe.pipeline.report.training import read_run_config
from parts.memory import PX, MemorySource, tiny_config, write_dataset


def test_heads_that_know_the_timestep_are_given_that_of_the_view_that_is_shown(tmp_path):
    """The first of an unflipped image, which here is the second."""
    views = (ViewSpec(draw=0, timestep=250, flip=True), ViewSpec(draw=0, timestep=50), ViewSpec(draw=0, timestep=90))
    url = write_dataset(tmp_path / "features", MemorySource(views=views))
    train(tiny_config(tmp_path / "run", datasets=(str(url),), epochs=2, lr=2e-2))
    features = RunFeatures.open(tmp_path / "run", read_run_config(tmp_path / "run"))
    rows = features.choose(2, seed=0)
    seen = features.see(rows)
    images = torch.stack([torch.from_numpy(read_image(features.source, row)) for row in rows])
    by_timestep = []
    with torch.inference_mode():
        for timestep in (50, 250):
            timesteps = {level.name: torch.full((2,), timestep) for level in features.levels}
            by_timestep.append(features.model(student_images(images, (PX, PX)), timesteps)["l3"])
    torch.testing.assert_close(torch.from_numpy(seen.regressed["l3"]), by_timestep[0])
    assert not torch.allclose(*by_timestep)
