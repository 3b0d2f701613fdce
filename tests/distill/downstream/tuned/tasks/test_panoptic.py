"""Panoptic segmentation from labels to scores: a handful of scenes learned by heart, and what is kept of an image."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dtpipe.distill.downstream.tuned.predictions import PanopticPrediction
from dtpipe.distill.downstream.tuned.run import tune
from dtpipe.distill.downstream.tuned.tasks.panoptic import TASK
from dtpipe.manifests.labels import ClassTable
from parts.objects import DIGITS_ON_GROUND, OVERFIT, SMALL_HEAD, scene_segments, scene_set, scene_student
from parts.tuning import tune_config, tune_job


def read_ids(content: bytes) -> np.ndarray:
    """Segment ids of a PNG as panopticapi reads them."""
    colours = np.asarray(Image.open(io.BytesIO(content)), dtype=np.int64)
    return colours[..., 0] + 256 * colours[..., 1] + 256 * 256 * colours[..., 2]


def test_a_handful_of_scenes_is_learned_by_heart(tmp_path: Path) -> None:
    scenes = scene_set(DIGITS_ON_GROUND, scene_segments)
    job = tune_job(tune_config(**OVERFIT, head=SMALL_HEAD), scenes, "panoptic", scene_student())
    result = tune(job, scenes, tmp_path, "cpu")
    assert result.value > 0.5 and result.others["PQ things"] > 0.5 and result.others["PQ stuff"] > 0.9
    segments = json.loads((tmp_path / "predictions" / "00001.json").read_text())
    ids = read_ids((tmp_path / "predictions" / "00001.png").read_bytes())
    assert {segment["id"]: segment["area"] for segment in segments} == {
        number: int((ids == number).sum()) for number in np.unique(ids[ids > 0]).tolist()
    }


def test_segments_are_kept_as_cocos_files_have_them() -> None:
    table = ClassTable(("sky", "cat"), frozenset({1}), {0: 187, 1: 17})
    segments = np.array([[0, 1, 1], [70000, 70000, 70000]], np.int32)
    (png, picture), (ending, content) = TASK.save(PanopticPrediction(segments, {1: 1, 70000: 0}), table)
    assert (png, ending) == (".png", ".json")
    np.testing.assert_array_equal(read_ids(picture), segments)
    assert json.loads(content) == [
        {"id": 1, "category_id": 17, "isthing": 1, "area": 2},
        {"id": 70000, "category_id": 187, "isthing": 0, "area": 3},
    ]
