"""What the tasks wrote is read as the same records; other files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dtpipe.distill.downstream.tuned.predictions import (
    ClassPrediction,
    Detections,
    MaskPrediction,
    PanopticPrediction,
)
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Panoptic
from dtpipe.manifests.records.document import write_document
from dtpipe.pipeline.report.tasks.predictions import KeptPredictions, as_said
from parts.objects import rectangles

SIZE = (6, 8)
RNG = np.random.default_rng(0)
TABLE = ClassTable(("cat", "dog", "sea"), frozenset({0, 1}), {0: 17, 1: 18, 2: 90})
MASKS = np.zeros((2, *SIZE), bool)
MASKS[0, 1:4, 2:7], MASKS[1, :2, :2] = True, True
SAID: dict[str, Any] = {
    "finetune": ClassPrediction(np.array([0.2, 0.7, 0.1], np.float32)),
    "segment": MaskPrediction(RNG.integers(0, 3, SIZE)),
    "detect": Detections(
        SIZE,
        np.array([[2, 1, 7, 4], [0, 0, 2, 2]], np.float32),
        np.array([1, 0]),
        np.array([0.9, 0.25], np.float32),
        MASKS,
    ),
    "panoptic": PanopticPrediction((MASKS[0] * 70_000 + ~MASKS[0] * 3).astype(np.int32), {3: 2, 70_000: 1}),
}


def keep(training: Path, task: str, said: Any, classes: ClassTable = TABLE, row: int = 1) -> KeptPredictions:
    """As scoring keeps them: what was said of the second of two images."""
    folder = training / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    write_document(folder / "keys.json", {"keys": ["a", "held out/b"]}, "")
    for ending, content in find_tuned(task).save(said, classes):
        (folder / f"{row:05d}{ending}").write_bytes(content)
    kept = KeptPredictions.open(training)
    assert kept is not None
    return kept


@pytest.mark.parametrize("task", SAID)
def test_what_a_task_saved_is_read_again(task: str, tmp_path: Path) -> None:
    said = keep(tmp_path, task, SAID[task]).read("held out/b", SIZE, find_tuned(task).kind, TABLE)
    assert type(said) is type(SAID[task])
    for name, value in vars(SAID[task]).items():
        found = getattr(said, name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            np.testing.assert_allclose(found, value, atol=1e-5)  # rounded in the file
        elif isinstance(value, np.ndarray):
            assert_array_equal(found, value)
        else:
            assert found == value


def test_an_image_without_objects_and_one_without_masks_are_read(tmp_path: Path) -> None:
    nothing = Detections(SIZE, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), None)
    said = keep(tmp_path, "detect", nothing).read("held out/b", SIZE, Instances, TABLE)
    assert isinstance(said, Detections) and said.boxes.shape == (0, 4) and said.masks is None


def test_a_training_that_kept_none_has_none(tmp_path: Path) -> None:
    assert KeptPredictions.open(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("task", "ending", "content"),
    [
        ("segment", ".png", b"GIF89a"),
        ("segment", ".png", None),
        ("finetune", ".json", b'{"classes": {"bird": 0.5}}'),
        ("finetune", ".json", b"[]"),
        ("detect", ".json", b'[{"bbox": [0, 0, 1, 1], "category_id": 5, "score": 1}]'),
        ("detect", ".json", b"{}["),
        ("panoptic", ".json", b"[]"),
    ],
)
def test_files_that_hold_something_else_are_named(
    task: str, ending: str, content: bytes | None, tmp_path: Path
) -> None:
    kept = keep(tmp_path, task, SAID[task])
    path = tmp_path / "predictions" / f"00001{ending}"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"00001: is no prediction of a 6x8 image .*; run `dtpipe eval` again"):
        kept.read("held out/b", SIZE, find_tuned(task).kind, TABLE)


@pytest.mark.parametrize("task", ["segment", "detect", "panoptic"])
def test_predictions_of_another_size_are_refused(task: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedDataError, match="7x8"):
        keep(tmp_path, task, SAID[task]).read("held out/b", (7, 8), find_tuned(task).kind, TABLE)


def test_a_mask_with_more_classes_than_there_are_is_refused(tmp_path: Path) -> None:
    kept = keep(tmp_path, "segment", MaskPrediction(np.full(SIZE, 3)))
    with pytest.raises(DamagedDataError, match="are not the classes'"):
        kept.read("held out/b", SIZE, Mask, TABLE)


def test_the_size_of_masks_is_read_and_a_first_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    kept = keep(tmp_path, "segment", SAID["segment"], row=0)
    assert kept.mask_px() == SIZE
    path = tmp_path / "predictions" / "00000.png"
    path.write_bytes(b"GIF89a")
    with pytest.raises(DamagedDataError, match=r"00000\.png: is no mask .*; run `dtpipe eval` again"):
        kept.mask_px()
    path.unlink()
    with pytest.raises(DamagedDataError, match=r"00000\.png: is no mask"):
        kept.mask_px()


def test_damaged_keys_are_named(tmp_path: Path) -> None:
    keep(tmp_path, "segment", SAID["segment"])
    (tmp_path / "predictions" / "keys.json").write_text(json.dumps({"names": []}))
    with pytest.raises(DamagedDataError, match=r"keys\.json"):
        KeptPredictions.open(tmp_path)


def test_the_truth_is_said_without_crowds_and_with_ignored_pixels_as_a_class_that_occurs() -> None:
    mask = as_said(Mask(np.array([[1, 255], [2, 0]])), TABLE)
    assert isinstance(mask, MaskPrediction)
    assert_array_equal(mask.numbers, [[1, 1], [2, 0]])
    objects = as_said(rectangles(SIZE, [(0, 0, 2, 2), (2, 1, 7, 4)], [0, 1], crowd=[True, False]), TABLE)
    assert isinstance(objects, Detections)
    assert_array_equal(objects.boxes, [[2, 1, 7, 4]])
    assert_array_equal(objects.masks, MASKS[:1])
    one = as_said(Class(1), TABLE)
    assert isinstance(one, ClassPrediction) and one.probabilities.tolist() == [0, 1, 0]
    segments = SAID["panoptic"]
    assert vars(as_said(Panoptic(segments.segments, segments.classes), TABLE)) == vars(segments)
