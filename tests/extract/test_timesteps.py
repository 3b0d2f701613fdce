"""Where a teacher is read unless settings say otherwise: by the teacher, and as a dataset or run began."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtpipe.extract.config import ExtractConfig, NoiseConfig, TeacherConfig
from dtpipe.extract.recipe import with_timesteps_of
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers import registry
from dtpipe.extract.teachers.files.published import PublishedTeacher, published_teachers
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import ViewSpec
from parts.tiny_teachers import MAKERS

MakeConfig = Callable[..., ExtractConfig]


def timesteps(url: str) -> list[int | None]:
    return [view.timestep for view in FeatureDataset.open(url).views]


@pytest.mark.parametrize(("family", "timestep"), [("ddpm", 50), ("adm", 50), ("stable_diffusion", 150)])
def test_a_family_has_a_timestep_of_its_own(family: str, timestep: int, tmp_path: Path) -> None:
    """The paper's: 50 for teachers of the images' own domain, 150 for one of images of all kinds."""
    assert load_teacher(MAKERS[family](tmp_path).config()).spec.timestep == timestep


def test_published_teachers_of_imagenet_are_read_at_the_timestep_of_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = {teacher.name for teacher in published_teachers() if teacher.timestep is not None}
    assert late == {teacher.name for teacher in published_teachers() if teacher.name.startswith("adm-imagenet")}
    assert {teacher.timestep for teacher in published_teachers() if teacher.name in late} == {150}
    path = str(MAKERS["ddpm"](tmp_path).path)
    place = {"kind": "ddpm", "url": f"hf://{path}@main", "licence": "MIT", "image_px": (32, 32), "levels": {}}
    entry = PublishedTeacher.model_validate(place | {"name": "named", "timestep": 150})
    monkeypatch.setattr(registry, "published_teachers", lambda: (entry,))
    monkeypatch.setattr(registry, "locate", lambda config, _: config.model_copy(update={"path": path}))
    assert load_teacher(TeacherConfig(path="named")).spec.timestep == 150
    assert load_teacher(TeacherConfig(path=path)).spec.timestep == 50


def test_a_dataset_begins_at_the_teachers_timestep_and_goes_on_at_its_own(make_config: MakeConfig) -> None:
    silent = make_config(noise=NoiseConfig())
    assert run_extraction(silent).num_ok > 0
    assert timesteps(silent.run.out) == [50]
    before = make_config(out=f"{silent.run.out}-before", noise={"timesteps": [150, 20], "flips": True})
    first = run_extraction(before)
    again = run_extraction(make_config(out=before.run.out, noise={"flips": True}))  # as if its default was that once
    assert (again.digest, again.shards_written) == (first.digest, 0)


def test_what_settings_say_is_kept(make_config: MakeConfig) -> None:
    config = make_config(noise={"timesteps": [7]})
    assert with_timesteps_of(config, [ViewSpec(draw=0, timestep=150)]) is config
    silent = make_config(noise={})
    assert with_timesteps_of(silent, [ViewSpec(draw=0, timestep=None)]) is silent  # a generator has none
