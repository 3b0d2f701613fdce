"""Activation maps are mean squares: of a plain forward pass of the noised image, by block and timestep, and of the
levels that the run's maps show."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from dtpipe.extract.noise import row_noise
from dtpipe.manifests.errors import TeacherError
from dtpipe.pipeline.report.maps.activations import TimestepTeacher, diffusion_teacher, heat, seen_energies
from dtpipe.pipeline.report.maps.features import RunFeatures, SeenImages
from dtpipe.pipeline.report.maps.sections import Row, activation_section
from dtpipe.pipeline.report.section import data_uri
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


def test_the_student_responds_as_its_own_levels_do(small_run: Path) -> None:
    """The backbone's maps against those of its own forward pass, the others against loops in float64."""
    features = RunFeatures.open(small_run, read_run_config(small_run))
    seen = features.see(features.choose(2, seed=0))
    maps = seen_energies(seen, 1)
    assert list(maps) == ["teacher", "regressor", "backbone"]
    assert [sorted(levels) for levels in maps.values()] == 3 * [["l2", "l3"]]
    image = torch.from_numpy(seen.images[1:]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        levels = dict(zip(features.model.student.strides, features.model.student(image), strict=True))
    for name, stride in (("l2", 4), ("l3", 8)):
        expected = np.square(levels[stride][0].double().numpy()).mean(axis=0)
        np.testing.assert_allclose(maps["backbone"][name], expected, rtol=1e-4)  # the student computes in float32
        for network, level in (("teacher", seen.teacher[name][1]), ("regressor", seen.regressed[name][1])):
            channels = [channel.astype(np.float64) ** 2 for channel in level]
            np.testing.assert_allclose(maps[network][name], sum(channels) / len(channels), rtol=1e-5)


def test_a_level_that_a_network_lacks_is_an_empty_cell_below_the_timesteps() -> None:
    own = {"l2": np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)}
    both = own | {"l3": np.ones((1, 2, 1, 1), np.float32)}
    seen = SeenImages(("a",), IMAGE[None], both, both, own)
    columns = {"l2": "tap, 2 channels", "l3": ""}
    html = activation_section(seen, [[Row("timestep 5", ["x", "y"])]], columns).html
    rows = dict(re.findall(r'<td class="soft">([\w ]+)</td>(.*?)</tr>', html))
    assert list(rows) == ["timestep 5", "teacher", "regressor", "backbone"]
    picture = f'<td><img src="{data_uri(heat(np.array([[8, 13], [20, 29]], np.float32)))}" width="128" alt=""></td>'
    assert rows["backbone"] == f"{picture}<td>-</td>"  # mean of 0 and 16, of 1 and 25, of 4 and 36, of 9 and 49
    assert rows["regressor"].startswith(picture) and rows["regressor"].count("<img") == 2


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
