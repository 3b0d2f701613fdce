"""Activation maps are mean squares of a plain forward pass of the noised image, by block and timestep."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from dtpipe.extract.noise import row_noise
from dtpipe.manifests.errors import TeacherError
from dtpipe.pipeline.report.maps.activations import TimestepTeacher, diffusion_teacher, heat
from dtpipe.pipeline.report.training import read_run_config
from parts.tensors import hooked, views

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
TIMESTEPS = (50, 350)


@pytest.fixture(scope="module")
def teacher(small_run: Path) -> TimestepTeacher:
    return diffusion_teacher(small_run, read_run_config(small_run))


def test_maps_are_mean_squares_of_a_plain_forward_pass(teacher: TimestepTeacher, ddpm: Path) -> None:
    found = teacher.energies(IMAGE, "key", TIMESTEPS, seed=4)
    pipeline = DDPMPipeline.from_pretrained(ddpm)
    taps = {level.name: level.tap for level in teacher.teacher.spec.levels}
    drawn = row_noise(4, "key", views(*TIMESTEPS), teacher.teacher.spec.noise_shapes, (32, 32))
    noise = torch.from_numpy(next(iter(drawn.values())))  # one draw for all timesteps
    image = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float() / 127.5 - 1
    for timestep, levels in zip(TIMESTEPS, found, strict=True):
        noised = pipeline.scheduler.add_noise(image, noise, torch.tensor([timestep]))
        plain = hooked(pipeline.unet, taps, lambda noised=noised, timestep=timestep: pipeline.unet(noised, timestep))
        assert sorted(levels) == ["l2", "l3"]
        for name, level in plain.items():
            expected = np.square(level[0].double().numpy()).mean(axis=0)
            np.testing.assert_allclose(levels[name], expected, rtol=1e-4)  # the teacher computes in float32


def test_an_image_of_another_size_comes_to_the_teachers(teacher: TimestepTeacher) -> None:
    (levels,) = teacher.energies(np.repeat(np.repeat(IMAGE, 2, axis=0), 2, axis=1), "key", [50], seed=4)
    assert levels["l2"].shape == (8, 8)


def test_heat_goes_from_the_lowest_cell_to_the_highest() -> None:
    picture = heat(np.array([[1.0, 2.0], [3.0, 5.0]], np.float32))
    brightness = picture.astype(int).sum(axis=2)
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 0] < brightness[1, 1]
    assert (heat(np.full((2, 2), 7.0, np.float32)) == picture[0, 0]).all()


def test_a_teacher_that_is_gone_is_named(small_run: Path, ddpm: Path, tmp_path: Path) -> None:
    config = read_run_config(small_run)
    copy = tmp_path / "features"
    shutil.copytree(config.datasets[0], copy)
    aside = ddpm.rename(tmp_path / "aside")
    try:
        with pytest.raises(TeacherError, match=str(ddpm)):
            diffusion_teacher(small_run, config.model_copy(update={"datasets": (str(copy),)}))
    finally:
        aside.rename(ddpm)
