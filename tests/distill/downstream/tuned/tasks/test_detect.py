"""Detection from labels to scores: a handful of scenes learned by heart, and what is kept of an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from dtpipe.distill.downstream.extractors import random_student
from dtpipe.distill.downstream.tuned.predictions import Detections
from dtpipe.distill.downstream.tuned.run import tune
from dtpipe.distill.downstream.tuned.tasks.detect import TASK
from dtpipe.distill.downstream.tuned.trainer import Tuning
from dtpipe.distill.student.student import StudentSpec
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable
from parts.objects import DIGITS, OVERFIT, SMALL_HEAD, rectangles, scene_objects, scene_set, scene_student, with_targets
from parts.tuning import tune_config, tune_job, tune_losses

# pycocotools decodes through an interface of numpy that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(("cascade", "steps"), [(False, 60), (True, 80)])
def test_a_handful_of_scenes_is_learned_by_heart(cascade: bool, steps: int, tmp_path: Path) -> None:
    scenes = scene_set(DIGITS, scene_objects)
    config = tune_config(**{**OVERFIT, "steps": steps}, head={**SMALL_HEAD, "cascade": cascade})
    job = tune_job(config, scenes, "detect", scene_student())
    result = tune(job, scenes, tmp_path, "cpu")
    assert result.value > 0.5 and result.others["mask AP"] > 0.5
    entries = json.loads((tmp_path / "predictions" / "00000.json").read_text())
    best = max(entries, key=lambda entry: entry["score"])
    truth = scenes.target(0)
    assert best["category_id"] in truth.classes
    overlap = (coco_mask.decode(best["segmentation"]).astype(bool) & truth.masks).sum(axis=(1, 2)).max()
    assert overlap > 0.5 * coco_mask.area(best["segmentation"])


@pytest.mark.parametrize(("cascade", "precision"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_scenes_without_digits_are_trained_on_beside_others(cascade: bool, precision: str, tmp_path: Path) -> None:
    objects = [rectangles((40, 48), [(4, 4, 30, 30)], [1]), rectangles((40, 48), [], [])]
    labelled = with_targets(np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8), objects, DIGITS)
    head = {**SMALL_HEAD, "cascade": cascade, "convs": 1}
    config = tune_config(steps=2, head=head, precision=precision)
    result = tune(tune_job(config, labelled, "detect"), labelled, tmp_path, "cpu")
    assert 0 <= result.value <= 1 and all(np.isfinite(value) for value in result.losses.values())


def test_a_training_that_broke_off_draws_the_same_samples_again(tmp_path: Path, monkeypatch) -> None:
    """Anchors and regions are drawn at random in each step; the engine seeds every step anew."""
    scenes = scene_set(DIGITS, scene_objects, num=2)
    config = tune_config(steps=4, batch_size=2, head=SMALL_HEAD)
    job = tune_job(config, scenes, "detect", random_student(StudentSpec("test_resnet", 4, (64, 64)), 0))

    def break_off(_trainer: Tuning, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tuning, "updated", break_off)
        tune(job, scenes, tmp_path / "broken", "cpu")
    resumed, unbroken = (tune(job, scenes, tmp_path / name, "cpu") for name in ("broken", "whole"))
    assert (resumed.resumed_step, unbroken.resumed_step) == (2, 0)
    assert tune_losses(tmp_path / "broken") == tune_losses(tmp_path / "whole")
    assert resumed.scores == unbroken.scores


def test_results_are_kept_as_cocos_files_have_them_under_the_data_sets_own_numbers() -> None:
    table = ClassTable(("cat", "dog"), numbers={0: 17, 1: 90})
    mask = np.zeros((1, 6, 8), bool)
    mask[0, 1:4, 2:7] = True
    found = Detections((6, 8), np.array([[2, 1, 7, 4]], np.float32), np.array([1]), np.array([0.75], np.float32), mask)
    ((ending, content),) = TASK.save(found, table)
    (entry,) = json.loads(content)
    assert (ending, entry["category_id"], entry["bbox"], entry["score"]) == (".json", 90, [2, 1, 5, 3], 0.75)
    np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), mask[0])


def test_labels_without_a_class_are_refused() -> None:
    with pytest.raises(ConfigError, match="no class of objects"):
        TASK.build(scene_student(), ClassTable(()), tune_config())
