"""What `eval` says about its own comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.engine.checkpoint import save_checkpoint
from dtpipe.distill.student.student import StudentSpec, build_student, spec_to_dict
from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.classes import coverage_notes
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.evaluate import evaluate, load_sets
from parts import paths
from parts.images import png, write_files
from parts.labelled import with_classes

GOLDEN = paths.GOLDEN / "v1_zarr"


def labelled(*keys: str) -> LabelledSet:
    return with_classes(np.zeros((len(keys), 8, 8, 3), np.uint8), keys, [0] * len(keys))


@pytest.mark.parametrize(
    ("task", "masks", "sentence"),
    [
        ("knn", "masks", "task knn learns from classes; with --masks use readout"),
        ("readout", None, "task readout learns from masks; give --masks, or with class folders use probe, knn"),
        ("segmnt", None, "downstream task 'segmnt' is unknown; choose one of probe, knn, readout"),
    ],
)
def test_a_task_that_does_not_fit_what_is_given_is_refused_before_anything_is_read(
    task: str, masks: str | None, sentence: str
) -> None:
    config = EvalConfig(checkpoint="nowhere", task=task, images="nowhere", masks=masks)
    with pytest.raises(ConfigError, match=sentence):
        evaluate(config, print)


def write_sides(root: Path, masks: dict[str, np.ndarray]) -> EvalConfig:
    """Images of 8 px whose left half is red, with masks of their own: those named t... to learn from, h... held out."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4, 0] = 255
    for name, mask in masks.items():
        write_files(root, {f"{name[0]}-images/{name}.png": png(image), f"{name[0]}-masks/{name}.png": png(mask)})
    places = {"images": "t-images", "masks": "t-masks", "test_images": "h-images", "test_masks": "h-masks"}
    return EvalConfig(checkpoint="", task="readout", **{key: str(root / place) for key, place in places.items()})


@pytest.mark.parametrize("ignore", [255, 9, 0, None])
def test_ignored_pixels_are_neither_learned_nor_scored_whatever_value_says_so(
    ignore: int | None, tmp_path: Path
) -> None:
    """By hand, of the classes `right` and `left` = 1 + right. All red cells are found as left, all others as right.

    Held out, rows 0 and 1 are true, rows 2 and 3 are right on both sides, rows 4 to 7 hold the ignored value: right
    meets 8 + 8 of the 8 + 16 cells that are or are called so, left 8 of 16.
    """
    right = 1 if ignore == 0 else 0
    mask = np.full((8, 8), right, np.uint8)
    mask[:, :4] += 1
    held_out, learned = mask.copy(), mask.copy()
    held_out[2:4] = right
    held_out[4:] = 9 if ignore is None else ignore
    learned[:1] = right if ignore is None else ignore
    config = write_sides(tmp_path, {"t0": learned, "t1": learned, "h0": held_out})
    train, test = load_sets(config.model_copy(update={"ignore_value": ignore, "resize": "none"}), (8, 8), print)
    pixels = FeatureExtractor("pixels", lambda images: {"l0": images.permute(0, 3, 1, 2).float()})
    result = run_probe("readout", [pixels], train, test, [None], [0], ProbeConfig(stride=1))
    ious = result.scores[0].settings["iou_by_class"]
    if ignore is None:  # rows 4 to 7 are of class 9, which nobody finds
        assert ious[9] == 0 and ious[0] == pytest.approx(16 / (24 + 16)) and ious[1] == pytest.approx(8 / 32)
        assert coverage_notes(train, test)[0].startswith("no labelled mask holds 9")
    else:
        assert ious[right : right + 2] == pytest.approx([16 / 24, 8 / 16])
        assert result.scores[0].value == pytest.approx(1 / 2 if right == 0 else (16 / 24 + 8 / 16) / 2)
        assert coverage_notes(train, test) == []


def test_masks_of_0_and_255_are_refused_until_255_is_a_class(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    config = write_sides(tmp_path, {"t0": mask, "h0": mask}).model_copy(update={"foreground": True})
    with pytest.raises(
        ConfigError, match=r"255, which means 'no label' here, is one: --foreground --ignore-value null"
    ):
        load_sets(config, (8, 8), print)
    train, _ = load_sets(config.model_copy(update={"ignore_value": None}), (8, 8), print)
    assert train.find_classes() == {0, 1} and train.classes.names == ("background", "foreground")


def test_a_class_of_one_image_is_learned_and_named_as_not_scored(tmp_path: Path) -> None:
    keys = ["bird/0.png", *(f"{name}/{idx}.png" for name in ("cat", "dog") for idx in range(4))]
    write_files(tmp_path, dict.fromkeys(keys, png(np.zeros((8, 8, 3), np.uint8))))
    train, test = load_sets(EvalConfig(checkpoint="", task="probe", images=str(tmp_path)), (8, 8), print)
    assert len(train) == 5 and "bird/0.png" in train.keys
    assert coverage_notes(train, test) == ["no held-out image holds bird: the scores say nothing of that"]


def test_one_image_cannot_be_split_and_is_refused(tmp_path: Path) -> None:
    config = write_sides(tmp_path, {"t0": np.eye(8, dtype=np.uint8)})
    with pytest.raises(ConfigError, match=r"t-images: too few images to hold some out"):
        load_sets(config.model_copy(update={"test_images": None, "test_masks": None}), (8, 8), print)


@pytest.mark.parametrize(("name", "px"), [("test_vit", 32), ("eva02_tiny_patch14_224", 28)])
def test_a_plain_transformer_is_scored_on_its_one_level(name: str, px: int, tmp_path: Path) -> None:
    """Images of two colours, 32 px; patches of 14 px count as stride 16, so that the level is l4."""
    student = build_student(StudentSpec(name, 4, (px, px)))
    save_checkpoint(
        tmp_path / "last.pt",
        "distill",
        {"student_spec": spec_to_dict(student.spec), "student": student.state_dict(), "ema": None},
    )
    rng = np.random.default_rng(0)
    for idx in range(24):
        image, mask = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8), np.zeros((32, 32), np.uint8)
        image[:16, :, idx % 2] += 170
        mask[:16] = 1
        name = f"{'ab'[idx % 2]}/{idx}.png"
        write_files(tmp_path, {f"images/{name}": png(image), f"masks/{name}": png(mask)})
    probe = ProbeConfig(max_iter=20, l2_grid=(0.1,), folds=2)
    for masks in (None, str(tmp_path / "masks")):
        config = EvalConfig(
            checkpoint=str(tmp_path),
            task="probe",
            images=str(tmp_path / "images"),
            masks=masks,
            labelled=("all",),
            seeds=1,
            probe=probe,
            px=32,
        )
        notes: list[str] = []
        result = evaluate(config, notes.append).result
        assert (result.task, "a probe of masks is task readout" in notes) == (
            ("readout", True) if masks else ("probe", False)
        )
        scores = [score for score in result.scores if score.extractor == "distilled"]
        assert {score.level for score in scores} == {"l4", "fixed"}
        assert scores[0].value > 0.9
