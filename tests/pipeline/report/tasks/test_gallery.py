"""Held-out images stand beside their labels and what each arm said of them; what is not there is left out."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.testing import assert_array_equal
from PIL import Image

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.result import ProbeResult, Score
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction, Detections, MaskPrediction
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.manifests.labels import ClassTable
from dtpipe.manifests.records.document import write_document
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.config import EvalConfig, ReportConfig
from dtpipe.pipeline.predict import overlay
from dtpipe.pipeline.report.section import Notes
from dtpipe.pipeline.report.tasks.gallery import prediction_pictures
from dtpipe.pipeline.report.tasks.results import TaskResult, read_result
from dtpipe.pipeline.sets import open_sets
from parts.images import draw_image, png, write_files

PX = 40
ARMS = ("random initialisation", "distilled")


def half_mask(idx: int) -> np.ndarray:
    """Class 1 left, 2 right, three rows without a label; the number of pixels of class 2 tells the image."""
    mask = np.ones((PX, PX), np.uint8)
    mask[:, 10 + idx :] = 2
    mask[:3] = 255
    return mask


@pytest.fixture
def masked(tmp_path: Path) -> EvalConfig:
    names = [f"{idx:03d}.png" for idx in range(8)]
    images = write_files(tmp_path / "images", {name: png(draw_image(idx, PX)) for idx, name in enumerate(names)})
    masks = write_files(tmp_path / "masks", {name: png(half_mask(idx)) for idx, name in enumerate(names)})
    return EvalConfig(checkpoint="x", task="segment", images=str(images), masks=str(masks))


@pytest.fixture
def classed(tmp_path: Path) -> EvalConfig:
    files = {f"{name}/{idx}.png": png(draw_image(idx, PX)) for idx in range(4) for name in ("cat", "dog")}
    return EvalConfig(checkpoint="x", task="finetune", images=str(write_files(tmp_path / "images", files)))


def keep(run: Path, config: EvalConfig, say: Callable[[LabelledSet, int, str], Any]) -> TaskResult:
    """The result of an evaluation of two arms with two seeds, and what they said of each held-out image."""
    task, test = find_tuned(config.task), open_sets(config, None, lambda _: None)[1]
    scores = []
    for arm in ARMS:
        for seed in (0, 1):
            name = f"{arm.replace(' ', '-')}-5-{seed}"
            scores.append(Score(arm, "head", 5, seed, 0.5, best=True, settings={"folder": name}))
            folder = run / "eval" / config.task / name / "predictions"
            folder.mkdir(parents=True)
            write_document(folder / "keys.json", {"keys": list(test.keys)}, "")
            for row in range(len(test)):
                for ending, content in task.save(say(test, row, arm if seed == 0 else "nobody"), test.classes):
                    (folder / f"{row:05d}{ending}").write_bytes(content)
    result = ProbeResult(config.task, task.metric_name, len(test), tuple(scores)).to_json()
    path = run / "eval" / f"{config.task}.json"
    document = {"config": config.model_dump(mode="json"), **result}
    write_document(path, json.loads(json.dumps(document)), "")
    return read_result(path)


def say_mask(test: LabelledSet, row: int, arm: str) -> MaskPrediction:
    """Ours is right, the rival says class 1 everywhere, other seeds class 0."""
    truth = np.asarray(test.target(row).numbers)  # type: ignore[union-attr]
    value = {"distilled": np.where(truth == 255, 1, truth), ARMS[0]: np.ones_like(truth)}
    return MaskPrediction(value.get(arm, np.zeros_like(truth)))


def pictures(html: str) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    ]


def shown(result: TaskResult, num: int = 2) -> tuple[str, list[str]]:
    notes: list[str] = []
    config = ReportConfig(run=("x",), num_images=num)
    return str(prediction_pictures(result, config, Notes(notes.append))), notes


def test_masks_of_the_labels_and_of_each_arm_stand_side_by_side(masked: EvalConfig, tmp_path: Path) -> None:
    html, notes = shown(keep(tmp_path / "run", masked, say_mask))
    assert notes == []
    assert re.findall("<th>(.*?)</th>", html) == ["image", "labels", "random initialisation", "distilled"]
    assert "trained on 5 labelled" in html
    seen = pictures(html)
    assert len(seen) == 2 * 4
    for photograph, labels, rival, ours in (seen[:4], seen[4:]):
        scale = len(labels) // PX
        assert labels.shape == rival.shape == ours.shape == (PX * scale, PX * scale, 3)
        assert (labels[: 3 * scale] == 128).all()  # nobody knows
        assert_array_equal(labels[4 * scale :], ours[4 * scale :])
        inside = np.s_[5 * scale : -scale, scale : 9 * scale]  # class 1 for all
        tint = np.array([128, 0, 0])  # of the first class after the background
        whole = photograph.repeat(scale, axis=0).repeat(scale, axis=1)
        assert np.abs(0.5 * whole[inside] + 0.5 * tint - rival[inside]).max() <= 1
        assert not np.array_equal(rival[:, -2 * scale], ours[:, -2 * scale])  # class 2
    colours = dict(re.findall(r"rgb\((.*?)\)\"></i>(.*?)</span>", html))
    assert list(colours.items()) == [("128, 0, 0", "1"), ("0, 128, 0", "2"), ("128, 128, 128", "no label")]


def test_classes_are_named_and_marked_right_or_wrong(classed: EvalConfig, tmp_path: Path) -> None:
    def say(test: LabelledSet, row: int, arm: str) -> ClassPrediction:
        truth = test.target(row).number  # type: ignore[union-attr]
        sure = np.array([0.25, 0.25], np.float32)
        sure[truth if arm == "distilled" else 1 - truth] = 0.75
        return ClassPrediction(sure)

    html, notes = shown(keep(tmp_path / "run", classed, say), num=3)
    assert notes == [] and "legend" not in html
    assert len(pictures(html)) == 3
    for row in re.findall('<tr class="first">(.*?)</tr>', html, re.DOTALL):
        truth, rival, ours = re.findall(r"<td>(<div class=.*?)</td>", row.partition("</td>")[2])
        name = re.sub("<.*?>", "", truth)
        assert f'<div class="right">{name} 0.75</div>' in ours
        assert '<div class="wrong">' in rival and f">{name} 0.25<" in rival


def found(size_px: tuple[int, int], *scores: float) -> Detections:
    """Objects of class 0 side by side, each a fifth of the image wide."""
    height, width = size_px
    lefts = np.arange(len(scores)) * width / 5
    boxes = np.stack([lefts, lefts * 0 + height / 4, lefts + width / 5, lefts * 0 + height / 2], axis=1)
    masks = np.zeros((len(scores), *size_px), bool)
    for idx, left in enumerate(lefts.astype(int)):
        masks[idx, height // 4 : height // 2, left : left + width // 5] = True
    return Detections(
        size_px, boxes.astype(np.float32), np.zeros(len(scores), np.int64), np.array(scores, np.float32), masks
    )


def test_objects_are_drawn_at_the_size_that_is_shown_and_the_surest_where_none_is_sure(tmp_path: Path) -> None:
    side = 640
    entries = [{"id": idx, "file_name": f"{idx}.png", "height": side, "width": side} for idx in range(2)]
    box = {"category_id": 90, "bbox": [64, 64, 192, 192], "segmentation": [[64, 64, 256, 64, 256, 256, 64, 256]]}
    boxes = [{"id": idx, "image_id": idx, "iscrowd": 0, "area": 192**2, **box} for idx in range(2)]
    document = {"images": entries, "annotations": boxes, "categories": [{"id": 90, "name": "kite"}]}
    grey = png(np.full((side, side, 3), 100, np.uint8))
    files = {"labels.json": json.dumps(document).encode(), "0.png": grey, "1.png": grey}
    root = write_files(tmp_path / "data", files)
    config = EvalConfig(checkpoint="x", task="detect", images=f"coco-json:{root}@labels.json")
    said = {"distilled": found((side, side), 0.9, 0.2, 0.1), ARMS[0]: found((side, side), 0.25, 0.2, 0.1, 0.09)}
    html, notes = shown(keep(tmp_path / "run", config, lambda _test, _row, arm: said.get(arm, said[ARMS[0]])), num=1)
    assert notes == []
    assert "Objects of score 0.3 and above, and the 3 surest of an image where none reaches it." in html
    assert re.findall(r"</i>(.*?)</span>", html) == ["kite"]
    photograph, labels, rival, ours = pictures(html)
    assert labels.shape == rival.shape == ours.shape == (320, 320, 3)  # drawn there, not shrunk with what is drawn
    row, own = 320 * 7 // 16, [32, 96, 160, 224]  # columns in the middle of each object
    grey_at = [[(picture[row, column] == 100).all() for column in own] for picture in (rival, ours)]
    assert grey_at == [[False, False, False, True], [False, True, True, True]]
    assert not (labels[80, 80] == 100).all() and (labels[200, 200] == 100).all()
    assert (photograph == 100).all()


def test_the_truth_has_names_without_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(overlay, "_label", lambda _draw, _corner, text, _colour: written.append(text))
    image, objects, table = np.zeros((320, 320, 3), np.uint8), found((320, 320), 1.0), ClassTable(("kite",))
    for with_scores in (True, False):
        overlay.painted(image, objects, table, 0.3, with_scores)
    assert written == ["kite 1.00", "kite"]


def test_a_result_of_before_predictions_were_kept_has_no_pictures(masked: EvalConfig, tmp_path: Path) -> None:
    result = keep(tmp_path / "run", masked, say_mask)
    document = json.loads(result.path.read_text())
    for score in document["scores"]:
        del score["settings"]["folder"]
    write_document(result.path, {name: value for name, value in document.items() if name != "checksum"}, "")
    assert shown(read_result(result.path)) == ("", [])


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run, _images: shutil.rmtree(run / "eval" / "segment"), "no predictions are kept in"),
        (lambda _run, images: shutil.rmtree(images), "images"),
        (
            lambda run, _images: (run / "eval/segment/distilled-5-0/predictions/00000.png").write_bytes(b""),
            "00000: is no prediction of a 40x40 image",
        ),
        (
            lambda run, _images: write_document(
                run / "eval/segment/distilled-5-0/predictions/keys.json", {"keys": ["other"]}, ""
            ),
            "none of the images that",
        ),
    ],
)
def test_what_is_gone_or_damaged_is_left_out_with_a_note(
    break_it: Callable[[Path, Path], Any], said: str, masked: EvalConfig, tmp_path: Path
) -> None:
    result = keep(tmp_path / "run", masked, say_mask)
    break_it(tmp_path / "run", tmp_path / "images")
    html, (note,) = shown(result, num=4)
    assert html == ""
    assert note.startswith("pictures of segment left out: ") and said in note


def test_an_arm_without_predictions_does_not_hide_the_others(masked: EvalConfig, tmp_path: Path) -> None:
    result = keep(tmp_path / "run", masked, say_mask)
    for seed in (0, 1):
        shutil.rmtree(tmp_path / f"run/eval/segment/distilled-5-{seed}")
    html, notes = shown(result)
    assert re.findall("<th>(.*?)</th>", html) == ["image", "labels", "random initialisation"]
    assert notes == []


def test_the_first_seed_whose_predictions_are_here_is_shown(masked: EvalConfig, tmp_path: Path) -> None:
    """Seed 0 was trained on another machine: of one arm nothing came from there, of the other no predictions."""
    path = keep(tmp_path / "run", masked, say_mask).path
    shutil.rmtree(tmp_path / "run/eval/segment/distilled-5-0")
    shutil.rmtree(tmp_path / "run/eval/segment/random-initialisation-5-0/predictions")
    result = read_result(path)
    assert [folder.name for folder in result.folders.values()] == ["random-initialisation-5-1", "distilled-5-1"]
    html, notes = shown(result, num=1)
    assert notes == [] and "by the first seed whose predictions are here" in html
    photograph, _labels, rival, ours = pictures(html)
    scale = len(ours) // PX
    assert_array_equal(ours, photograph.repeat(scale, axis=0).repeat(scale, axis=1) // 2)  # seed 1: class 0, black
    assert_array_equal(rival, ours)


def test_a_result_that_says_no_images_is_left_out_with_a_note(masked: EvalConfig, tmp_path: Path) -> None:
    result = keep(tmp_path / "run", masked, say_mask)
    document = json.loads(result.path.read_text()) | {"config": {"task": "segment"}}
    write_document(result.path, {name: value for name, value in document.items() if name != "checksum"}, "")
    html, (note,) = shown(read_result(result.path))
    assert html == "" and "does not say on which images it was scored" in note


def test_what_the_command_eval_leaves_is_shown(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    tune = {"steps": 1, "batch_size": 2, "run.workers": 0, "run.save_every": 1}
    settings = [part for key, value in tune.items() for part in ("-s", f"eval.tune.{key}={value}")]
    images = ["--images", small_run.parent / "images", "--labelled", 2, "--seeds", 1, "--device", "cpu"]
    done = CliRunner().invoke(main, list(map(str, ["eval", run, "finetune", *images, *settings])))
    assert done.exit_code == 0, done.output
    assert re.search(r"^finetune: distilled, 2 labelled, seed 0: accuracy [01]\.\d{3} at lr 0\.001$", done.output, re.M)
    html, notes = shown(read_result(run / "eval" / "finetune.json"), num=4)
    assert notes == []
    assert sorted(re.findall("<th>(.*?)</th>", html)) == ["distilled", "image", "labels", "random initialisation"]
    assert len(re.findall('<div class="(?:right|wrong)">', html)) == 2 * 4


def test_masks_of_frozen_features_are_shown_as_they_were_scored(small_run: Path, tmp_path: Path) -> None:
    """Cells of 4 px at the student's 32 px, from images and masks of 40 px."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    for idx in range(8):
        image = {f"images/{idx}.png": png(draw_image(idx, PX)), f"masks/{idx}.png": png(half_mask(idx))}
        write_files(tmp_path, image)
    probe = ["-s", "eval.probe.max_iter=3", "-s", "eval.probe.folds=2", "--device", "cpu"]
    places = ["--images", tmp_path / "images", "--masks", tmp_path / "masks", "--labelled", "2,all", "--seeds", 2]
    done = CliRunner().invoke(main, list(map(str, ["eval", run, "readout", *places, *probe])))
    assert done.exit_code == 0, done.output
    result = read_result(run / "eval" / "readout.json")
    html, notes = shown(result, num=1)
    assert notes == [] and "classifiers on frozen features" in html
    columns = re.findall("<th>(.*?)</th>", html)
    assert columns[:2] == ["image", "labels"] and set(columns[2:]) == set(result.arms) >= {"distilled", "teacher"}
    photograph, labels, *said = pictures(html)
    assert photograph.shape == (32, 32, 3) and len(said) == len(result.arms)
    side = len(labels) // 8  # of a cell, whose last row and column are for borders
    half = photograph.repeat(side // 4, axis=0).repeat(side // 4, axis=1) // 2
    for picture in said:
        tint = (picture.astype(int) - half).reshape(8, side, 8, side, 3)[:, :-1, :, :-1]
        assert np.ptp(tint, axis=(1, 3)).max() <= 1  # one colour over each
        assert len(np.unique(tint[:, 0, :, 0].reshape(-1, 3) // 8, axis=0)) > 1


def test_classes_of_frozen_features_are_named(small_run: Path, tmp_path: Path) -> None:
    """Images of 40 px, larger than the student's 32."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    write_files(tmp_path, {f"images/{idx % 2}/{idx}.png": png(draw_image(idx, PX)) for idx in range(8)})
    probe = ["-s", "eval.probe.max_iter=3", "-s", "eval.probe.folds=2", "--device", "cpu"]
    words = ["--images", tmp_path / "images", "--labelled", "2,all", "--seeds", 2, *probe]
    done = CliRunner().invoke(main, list(map(str, ["eval", run, "probe", *words])))
    assert done.exit_code == 0, done.output
    result = read_result(run / "eval" / "probe.json")
    html, notes = shown(result, num=2)
    assert notes == [] and "classifiers on frozen features" in html
    assert {image.shape for image in pictures(html)} == {(PX, PX, 3)}
    assert len(re.findall('<div class="(?:right|wrong)">', html)) == 2 * len(result.arms)
    assert set(result.by_class["accuracy"]["distilled"][max(result.numbers)]) == {"0", "1"}
