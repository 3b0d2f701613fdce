"""The interpreter's part of a page: its scores by class beside its rivals', its pictures, and what is left out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.labels.files import load_interpreter
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.soft_labels import interpreter_recipe
from dtpipe.pipeline.report.interpreter import interpreter_sections
from parts.interpreters import CLASSES, write_interpreter
from parts.memory import level_spec, tiny_config, write_dataset
from parts.soft_labels import Labelled

LEVEL = level_spec("l3", 8, 4)
SCORES = {
    "interpreter": {
        "value": 0.5,
        "others": {"pixel accuracy": 0.75},
        "by_class": dict(zip(CLASSES, (1, 0.5, 0.25, None), strict=True)),
    },
    "linear <read-out>": {"value": 0.25, "others": {}, "by_class": dict.fromkeys(CLASSES, 0.25)},
}


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    """A run that joined features and the soft labels of an interpreter with scores and three pictures."""
    record = {"scores": SCORES, "data": {"num_labelled": 20, "num_held_out": 9}}
    head = write_interpreter(tmp_path / "head", (LEVEL,), record=record)
    for idx in range(3):
        (tmp_path / "head" / "pictures").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 24, 3), idx, np.uint8)).save(tmp_path / "head" / "pictures" / f"00{idx}.png")
    features = write_dataset(tmp_path / "features", Labelled(num_rows=4, bad=(), levels=(LEVEL,)))
    teacher = interpreter_recipe(load_interpreter(head).digest, CLASSES, {"dataset": "ef" * 32})
    recorded = {"config": {"soft_labels": {"interpreter": head}}}
    soft = Labelled(num_rows=4, bad=(), levels=(level_spec("l3.labels", 8, 3, role="soft_labels"),))
    labels = write_dataset(tmp_path / "labels", soft, provenance=recorded, teacher=teacher, images="joined")
    return tiny_config(tmp_path / "run", datasets=(str(features), str(labels)), join=True)


def sections(config: DistillConfig, num: int = 2) -> tuple[list[str], list[str]]:
    """Pages of the sections, and what was left out."""
    said: list[str] = []

    def leave_out(what: str, err: DtpipeError) -> None:
        said.append(f"{what}: {err}")

    return [str(section.html) for section in interpreter_sections(config, num, leave_out)], said


def test_scores_of_each_class_and_some_pictures_are_shown(config: DistillConfig) -> None:
    (page,), said = sections(config)
    assert said == [] and "20 labelled images and scored on 9 held-out ones" in page
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL)]
    assert rows == [
        ["", "interpreter", "linear &lt;read-out&gt;"],
        ["mIoU", "0.500", "0.250"],
        ["pixel accuracy", "0.750", "-"],
        ["sky", "1.000", "0.250"],
        ["sea", "0.500", "0.250"],
        ["land", "0.250", "0.250"],
        ["boat", "-", "0.250"],
    ]
    assert page.count("data:image/png;base64,") == 2


def test_another_interpreter_or_none_is_left_out_with_a_sentence(config: DistillConfig, tmp_path: Path) -> None:
    write_interpreter(tmp_path / "head", (LEVEL,), 1, record={"scores": SCORES})
    assert sections(config)[0] == [] and "holds another interpreter than the one" in sections(config)[1][0]
    shutil.rmtree(tmp_path / "head")
    assert sections(config)[0] == [] and "holds no interpreter" in sections(config)[1][0]


def test_a_run_without_soft_labels_has_no_such_part(config: DistillConfig) -> None:
    assert sections(config.model_copy(update={"datasets": config.datasets[:1]})) == ([], [])
