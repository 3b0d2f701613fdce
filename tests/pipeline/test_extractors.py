"""Which arms a table of frozen features has, and at which size a teacher sees images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dtpipe.distill.downstream.extractors import PATCHES, POSITION, RAW_PIXELS, FeatureExtractor
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.sources.images import resize_image
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.arms import Comparison, open_comparison
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.extractors import OwnImages, extractors_of, reader_at, teacher_extractor
from dtpipe.pipeline.sets import open_sets
from dtpipe.pipeline.trained_on import RunTeacher
from parts.images import png, write_files, write_images
from parts.memory import write_student

TASK = TransformRecipe(height=16, width=16)


def settings(tmp_path: Path, **more: object) -> EvalConfig:
    write_images(tmp_path / "images", 8, px=48)
    run = tmp_path / "run"
    run.mkdir()
    write_student(run / "last.pt", "test_resnet", (16, 16))
    values = {"checkpoint": str(run), "task": "probe", "images": str(tmp_path / "images"), **more}
    return EvalConfig.model_validate(values)


def arms(config: EvalConfig, teacher: RunTeacher, said: list[str]) -> tuple[dict[str, FeatureExtractor], Comparison]:
    comparison = open_comparison(config, said.append)
    train, _ = open_sets(config, TASK, said.append)
    extractors = extractors_of(config, comparison, teacher, train, TASK, said.append)
    return {extractor.name: extractor for extractor in extractors}, comparison  # type: ignore[misc]


def test_a_teacher_sees_images_read_at_its_own_size_and_the_student_at_its(tmp_path: Path, ddpm: Path) -> None:
    config, said = settings(tmp_path), list[str]()
    extractors, _ = arms(config, RunTeacher({"path": str(ddpm)}, 50, (32, 32)), said)
    train, _ = open_sets(config, TASK, said.append)
    whole = []
    for key in train.keys[:2]:
        with Image.open(tmp_path / "images" / key) as image:
            pixels = np.asarray(image.convert("RGB"))
        whole.append(resize_image(pixels, TransformRecipe(height=32, width=32)))
    expected = teacher_extractor(TeacherConfig(path=str(ddpm)), 50, 0, "cpu", (32, 32))(
        torch.from_numpy(np.stack(whole))
    )
    levels = extractors["teacher"].levels(train, [0, 1])
    assert all(torch.equal(levels[name], expected[name]) for name in expected)
    blurred = teacher_extractor(TeacherConfig(path=str(ddpm)), 50, 0, "cpu", (32, 32))(train.read_images([0, 1]))
    assert not torch.equal(levels["l2"], blurred["l2"])
    assert extractors["distilled"].read is None and said == []


def test_a_teacher_of_the_tasks_size_or_of_another_view_sees_the_tasks_images(tmp_path: Path) -> None:
    config, said = settings(tmp_path), list[str]()
    assert reader_at(config, (16, 16), TASK, said.append) is None and said == []
    assert reader_at(config, (16, 32), TASK, said.append) is None
    assert said[0].startswith("the teacher sees the task's images, 16x16 px, brought to its 16x32: read at that size")
    stretched = TASK.model_copy(update={"resize": "stretch"})
    reader = reader_at(config, (16, 32), stretched, said.append)
    assert isinstance(reader, OwnImages) and len(said) == 1
    train, _ = open_sets(config, TASK, said.append)
    assert reader(train.keys[:3]).shape == (3, 16, 32, 3)


def test_dense_tables_have_rivals_that_know_the_place_of_a_cell(tmp_path: Path) -> None:
    masks = {f"masks/{'cat' if idx % 2 else 'dog'}/{idx:03d}.png": png(np.eye(48, dtype=np.uint8)) for idx in range(8)}
    write_files(tmp_path, masks)
    extractors, _ = arms(
        settings(tmp_path, masks=str(tmp_path / "masks"), task="readout"), RunTeacher({}, None, None), []
    )
    assert list(extractors) == [RAW_PIXELS, POSITION, PATCHES, "random initialisation", "distilled"]
    (tmp_path / "classes").mkdir()
    extractors, _ = arms(settings(tmp_path / "classes"), RunTeacher({}, None, None), [])
    assert list(extractors) == [RAW_PIXELS, "random initialisation", "distilled"]
