"""The command `predict` on real files: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dtpipe.distill.downstream.tuned.registry import TUNED_TASKS
from dtpipe.distill.export.predictor import Predictor, load_predictor
from dtpipe.pipeline.cli.main import main
from parts.predictors import SEGMENTS, THINGS, seeing_bright, train_cell, write_untrained
from parts.tuning import bright_halves

BOXES = {"a/000000000007.png": ((4, 4, 20, 16), None), "b/000000000012.jpg.png": ((2, 10, 12, 30), (20, 5, 31, 25))}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def done(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictors of masks and of classes, exported by the command."""
    root = tmp_path_factory.mktemp("predictors")
    for task in ("segment", "finetune"):
        cell = train_cell(root / "runs" / task, task)
        result = done("export", cell, "--head", "--out", root / task)
        assert "loaded again" in result.stdout and "dtpipe predict" in result.stdout
        assert "not finished" not in result.stderr
        (cell / "score.json").unlink()
        assert "is not finished and scored" in done("export", cell, "--head", "--out", root / task).stderr
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images of two sizes in folders."""
    for number, image in enumerate(map(bright_halves(4, 9).image, range(4))):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if number else image[:, :20]).save(path)
    return tmp_path / "photos"


@pytest.fixture
def rectangles(tmp_path: Path) -> Path:
    """Dark images with a red rectangle, or a red and a blue one."""
    for key, boxes in BOXES.items():
        image = np.zeros((32, 40, 3), np.uint8)
        for channel, box in zip((0, 2), boxes, strict=True):
            if box:
                image[box[1] : box[3], box[0] : box[2], channel] = 255
        path = tmp_path / "rectangles" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "rectangles"


def test_masks_are_png_files_with_a_palette_under_the_keys(predictors: Path, photos: Path, tmp_path: Path) -> None:
    done("predict", predictors / "segment", "--images", photos, "--out", tmp_path / "out", "--overlay")
    predictor = load_predictor(predictors / "segment")
    for key in ("a/0.png", "b/1.png", "a/2.png", "b/3.png"):
        image = np.asarray(Image.open(photos / key))
        with Image.open(tmp_path / "out" / "masks" / f"{key}.png") as mask:
            assert mask.mode == "P" and mask.size == (image.shape[1], image.shape[0])
            np.testing.assert_array_equal(np.asarray(mask), predictor.predict([image])[0].numbers)
        with Image.open(tmp_path / "out" / "overlays" / f"{key}.png") as overlay:
            assert overlay.mode == "RGB"
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["classes"]["names"] == ["0", "1"]


def test_classes_are_a_table_in_the_order_of_the_source(predictors: Path, photos: Path, tmp_path: Path) -> None:
    done("predict", predictors / "finetune", "--images", photos, "--out", tmp_path / "out", "--batch-size", 3)
    with (tmp_path / "out" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    predictor = load_predictor(predictors / "finetune")
    for row in rows:
        (expected,) = predictor.predict([np.asarray(Image.open(photos / row["key"]))])
        assert row["class"] == predictor.classes.names[expected.probabilities.argmax()]
        assert float(row["probability"]) == pytest.approx(float(expected.probabilities.max()), abs=1e-5)


def test_objects_are_results_that_cocos_own_evaluation_scores_as_perfect(
    rectangles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image numbers are those of the file names, categories the data set's own; AP is 1 where all is found."""
    monkeypatch.setitem(TUNED_TASKS, "detect", seeing_bright("detect"))
    predictor, out = write_untrained(tmp_path / "predictor", "detect", THINGS), tmp_path / "out"
    done("predict", predictor, "--images", rectangles, "--out", out, "--overlay", "--min-score", 0.2)
    truth = json.loads((out / "images.json").read_text())
    assert [(image["id"], image["file_name"], image["height"], image["width"]) for image in truth["images"]] == [
        (1, "a/000000000007.png", 32, 40),
        (2, "b/000000000012.jpg.png", 32, 40),
    ]
    assert truth["categories"] == [{"id": 7, "name": "lamp"}, {"id": 90, "name": "window"}]
    results = json.loads((out / "results.json").read_text())
    assert {(entry["image_id"], entry["category_id"]) for entry in results} == {(1, 7), (2, 7), (2, 90)}
    for number, boxes in enumerate(BOXES.values(), 1):
        for category, box in zip((7, 90), boxes, strict=True):
            if box:
                xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                polygon = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
                truth["annotations"].append(
                    {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": category, "bbox": xywh}
                    | {"area": xywh[2] * xywh[3], "iscrowd": 0, "segmentation": [polygon]}
                )
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    coco = COCO(str(tmp_path / "truth.json"))
    for kind in ("bbox", "segm"):
        scored = COCOeval(coco, coco.loadRes(str(out / "results.json")), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        assert scored.stats[0] == pytest.approx(1.0)
    capsys.readouterr()


def test_image_numbers_are_those_of_the_file_names_where_each_has_one(
    rectangles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rectangles / "b" / "000000000012.jpg.png").rename(rectangles / "b" / "000000000012.png")
    monkeypatch.setitem(TUNED_TASKS, "detect", seeing_bright("detect"))
    predictor = write_untrained(tmp_path / "predictor", "detect", THINGS)
    done("predict", predictor, "--images", rectangles, "--out", tmp_path / "out")
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["id"] for image in images] == [7, 12]


def test_segments_are_cocos_panoptic_format(rectangles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TUNED_TASKS, "panoptic", seeing_bright("panoptic"))
    predictor, out = write_untrained(tmp_path / "predictor", "panoptic", SEGMENTS), tmp_path / "out"
    done("predict", predictor, "--images", rectangles, "--out", out, "--overlay")
    document = json.loads((out / "panoptic.json").read_text())
    assert [entry["isthing"] for entry in document["categories"]] == [1, 1, 0]
    assert [image["file_name"] for image in document["images"]] == sorted(BOXES)
    for annotation, boxes in zip(document["annotations"], BOXES.values(), strict=True):
        colours = np.asarray(Image.open(out / "panoptic" / annotation["file_name"])).astype(int)
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        expected = {2: 32 * 40}
        for number, box in enumerate(boxes):
            if box:
                expected[number] = (box[2] - box[0]) * (box[3] - box[1])
                expected[2] -= expected[number]
        areas = {entry["category_id"]: int((ids == entry["id"]).sum()) for entry in annotation["segments_info"]}
        assert areas == expected
        assert {entry["id"] for entry in annotation["segments_info"]} == set(np.unique(ids))


@pytest.mark.parametrize(("task", "classes"), [("detect", THINGS), ("panoptic", SEGMENTS)])
def test_the_real_networks_predict_too(task: str, classes: Any, rectangles: Path, tmp_path: Path) -> None:
    predictor = write_untrained(tmp_path / "predictor", task, classes, head={"width": 8, "anchor_scale": 4.0})
    result = done("predict", predictor, "--images", rectangles, "--out", tmp_path / "out", "--overlay", "--json")
    assert json.loads(result.stdout)["num_images"] == 2


def test_what_is_done_is_not_done_again_and_what_is_missing_is(
    predictors: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is gone, an overlay that was not asked for before, an image that came later."""
    seen: list[int] = []
    faithful = Predictor.predict

    def counted(self: Predictor, images: Any) -> Any:
        seen.append(len(images))
        return faithful(self, images)

    monkeypatch.setattr(Predictor, "predict", counted)
    command = ["predict", predictors / "segment", "--images", photos, "--out", tmp_path / "out"]
    done(*command)
    done(*command)
    assert sum(seen) == 4
    (tmp_path / "out" / "masks" / "a" / "0.png.png").unlink()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photos / "a" / "new.png")
    result = done(*command)
    assert sum(seen) == 6
    assert "3 of 5 images done before" in result.stderr
    done(*command, "--overlay")
    assert sum(seen) == 11
    assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 5


@pytest.fixture
def num_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each call of a predictor."""
    seen: list[int] = []
    faithful = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, images: seen.append(len(images)) or faithful(self, images))
    return seen


def test_an_image_that_changed_under_its_key_is_predicted_again(
    predictors: Path, photos: Path, tmp_path: Path, num_seen: list[int]
) -> None:
    """A touched file is read and found the same; one that is broken now leaves nothing behind."""
    command = ["predict", predictors / "segment", "--images", photos, "--out", tmp_path / "out", "--max-bad", 1]
    done(*command, "--overlay")
    os.utime(photos / "a" / "0.png")
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(photos / "b" / "1.png")
    (photos / "b" / "3.png").write_bytes(b"broken")
    result = done(*command)
    assert "2 images changed since, b/1.png for one, and are done again" in result.stderr
    assert sum(num_seen) == 4 + 1
    masks = tmp_path / "out" / "masks" / "b"
    with Image.open(masks / "1.png.png") as mask:
        assert mask.size == (24, 20)
    assert not (masks / "3.png.png").exists()
    assert {path.name for path in (tmp_path / "out" / "overlays").rglob("*.png")} == {"0.png.png", "2.png.png"}
    assert "changed" not in done(*command).stderr and sum(num_seen) == 5


def test_images_without_a_stamp_are_known_by_their_bytes(
    predictors: Path, photos: Path, tmp_path: Path, num_seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtpipe.pipeline.predict.run.file_stamp", lambda _uri: "")
    command = ["predict", predictors / "finetune", "--images", photos, "--out", tmp_path / "out"]
    done(*command)
    done(*command)
    assert sum(num_seen) == 4
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(photos / "b" / "1.png")
    done(*command)
    assert sum(num_seen) == 5


def test_overlays_are_drawn_anew_for_another_score(
    rectangles: Path, tmp_path: Path, num_seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TUNED_TASKS, "detect", seeing_bright("detect"))
    predictor, out = write_untrained(tmp_path / "predictor", "detect", THINGS), tmp_path / "out"
    command = ["predict", predictor, "--images", rectangles, "--out", out]

    def overlays() -> list[bytes]:
        return [path.read_bytes() for path in sorted((out / "overlays").rglob("*.png"))]

    done(*command, "--overlay", "--min-score", 0)
    all_drawn = overlays()
    done(*command, "--overlay", "--min-score", 1)
    assert len(num_seen) == 2 and all(old != new for old, new in zip(all_drawn, overlays(), strict=True))
    done(*command, "--overlay", "--min-score", 1)
    done(*command, "--min-score", 0)  # nothing is drawn, so nothing is missing
    assert len(num_seen) == 2


def test_a_stop_keeps_what_is_done_and_the_next_run_goes_on(
    predictors: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faithful = Predictor.predict

    def stopped(self: Predictor, images: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return faithful(self, images)

    command = ["predict", predictors / "segment", "--images", photos, "--out", tmp_path / "out", "--batch-size", 2]
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", stopped)
        result = run(*command)
    assert result.exit_code == 143
    assert "2 of 4 images: stopped by SIGTERM; predictions are kept, run the same command to go on" in result.stderr
    with (tmp_path / "out" / "done" / "00000.jsonl").open("ab") as file:
        file.write(b'{"key": "a line cut sh')  # as a kill leaves it
    assert "2 of 4 images done before" in done(*command).stderr
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 4


def test_a_bad_image_is_named_and_left_out_and_too_many_end_the_run(
    predictors: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "a" / "broken.png").write_bytes(b"no image")
    command = ["predict", predictors / "finetune", "--images", photos, "--out", tmp_path / "out"]
    result = run(*command)
    assert result.exit_code == 7
    assert "1 bad image, predict.max_bad allows 0 (a/broken.png: not a readable image" in result.stderr
    assert "--max-bad" in result.stderr
    result = done(*command, "--max-bad", 1)
    assert "left out a/broken.png: not a readable image" in result.stderr
    assert "4 predicted, 1 bad, of 5" in result.stdout
    assert "broken" not in (tmp_path / "out" / "classes.csv").read_text()


def test_another_predictor_source_or_folder_is_refused(predictors: Path, photos: Path, tmp_path: Path) -> None:
    done("predict", predictors / "segment", "--images", photos, "--out", tmp_path / "out")
    result = run("predict", predictors / "finetune", "--images", photos, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "holds other predictions" in result.stderr and 'task: "segment" -> "finetune"' in result.stderr
    result = run("predict", predictors / "segment", "--images", photos / "a", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "images: " in result.stderr
    result = run("predict", predictors / "segment", "--images", photos, "--out", photos / "masks")
    assert result.exit_code == 2 and "lies among the images" in result.stderr
    result = run("predict", predictors / "segment", "--images", photos, "--out", predictors / "finetune")
    assert result.exit_code == 2 and "holds a predictor" in result.stderr
    result = run("predict", photos, "--images", photos, "--out", tmp_path / "new")
    assert result.exit_code == 3 and "holds no predictor" in result.stderr
    assert not (tmp_path / "new").exists()
    result = run("predict", predictors / "segment", "--images", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert result.exit_code == 3 and not (tmp_path / "new").exists()


def test_two_commands_do_not_write_into_one_folder(predictors: Path, photos: Path, tmp_path: Path) -> None:
    command = ["predict", predictors / "segment", "--images", photos, "--out", tmp_path / "out"]
    done(*command)
    with (tmp_path / "out" / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(*command)
    assert result.exit_code == 2 and "another process predicts into this folder" in result.stderr


def test_images_of_a_layout_are_predicted_by_its_keys(
    rectangles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's format, whose images lie where its file says."""
    names = sorted(BOXES)
    images = [{"id": number, "file_name": name, "height": 32, "width": 40} for number, name in enumerate(names, 1)]
    labels = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "lamp"}]}
    (rectangles / "labels.json").write_text(json.dumps(labels))
    monkeypatch.setitem(TUNED_TASKS, "detect", seeing_bright("detect"))
    predictor = write_untrained(tmp_path / "predictor", "detect", THINGS)
    place = f"coco-json:{rectangles}@labels.json"
    done("predict", predictor, "--images", place, "--out", tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == names


def test_images_can_be_brought_to_a_size_first(predictors: Path, photos: Path, tmp_path: Path) -> None:
    done("predict", predictors / "segment", "--images", photos, "--out", tmp_path / "out", "--px", "24,48")
    masks = [np.asarray(Image.open(path)) for path in (tmp_path / "out" / "masks").rglob("*.png")]
    assert [mask.shape for mask in masks] == [(24, 48)] * 4
