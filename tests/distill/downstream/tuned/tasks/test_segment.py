"""Segmentation learns what it is shown: head, targets, training, views of whole images and scores agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import jaccard_score

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.run import tune
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.distill.student.student import StudentSpec, build_student
from parts.labelled import with_masks
from parts.tuning import tune_losses

PX, NUM = 64, 4


def shapes() -> LabelledSet:
    """Bars of three colours on noise, each colour a class, with an unknown corner."""
    rng = np.random.default_rng(0)
    images, masks = rng.integers(0, 90, (NUM, PX, PX, 3)), np.zeros((NUM, PX, PX), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        for number in (1, 2, 3):
            top, left = 4 * rng.integers(0, 10), 4 + 20 * (number - 1)
            place = np.s_[top : top + 24, left : left + 16]
            mask[place], image[place] = number, 40
            image[(*place, number - 1)] = 230
        mask[-8:, -8:] = 255
    return with_masks(images.astype(np.uint8), [f"{idx}.png" for idx in range(NUM)], masks)


def settings(**changes: Any) -> TuneConfig:
    values = {
        "steps": 40,
        "batch_size": NUM,
        "lr": 1e-2,
        "augment": {"flip": 0},
        "head": {"width": 32, "dropout": 0},
        "run": {"workers": 0, "log_every": 10},
    }
    return TuneConfig.model_validate({**values, **changes})


@pytest.mark.parametrize(
    ("name", "precision"),
    [("segment", "float32"), ("fcn", "float32"), ("few-labels", "float32"), ("fcn", "bfloat16")],
)
def test_it_overfits_four_images_and_keeps_what_it_predicts(name: str, precision: str, tmp_path: Path) -> None:
    """mIoU over 0.9, with the masks that were kept and scikit-learn too."""
    labelled = shapes()
    student = build_student(StudentSpec("resnet10t" if name == "segment" else "test_resnet", 4, (PX, PX)))
    config = settings(precision=precision)
    result = tune(TuneJob(find_tuned(name), student, labelled, config), labelled, tmp_path, "cpu")
    losses = tune_losses(tmp_path)
    assert result.value > 0.9 and np.isfinite(losses).all() and losses[-1] < losses[0] / 2
    keys = json.loads((tmp_path / "predictions" / "keys.json").read_text())["keys"]
    assert keys == list(labelled.keys)
    seen = np.stack([np.asarray(Image.open(tmp_path / "predictions" / f"{idx:05d}.png")) for idx in range(NUM)])
    truth = labelled.read_masks(range(NUM)).numpy()
    known = truth >= 0
    miou = jaccard_score(truth[known], seen[known], average="macro")
    assert result.others.get("mIoU", result.value) == pytest.approx(miou, rel=1e-6)
    assert set(result.by_class["IoU"]) == {"0", "1", "2", "3"}
