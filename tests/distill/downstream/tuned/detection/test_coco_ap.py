"""COCO's precision equals pycocotools' on the cases in which evaluations go astray."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dtpipe.distill.downstream.tuned.detection.coco_ap import CocoScores
from dtpipe.distill.downstream.tuned.predictions import Detections
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Instances
from parts.objects import rectangle_mask, rectangles

TABLE = ClassTable(("cat", "dog", "never"))
SIZE = (150, 200)
NAMES = ["AP", "AP50", "AP75", "AP small", "AP medium", "AP large"]
NAMES += ["AR1", "AR10", "AR100", "AR small", "AR medium", "AR large"]

Pair = tuple[Detections, Instances]


def detections(boxes: Sequence, classes: Sequence[int], scores: Sequence[float], masks: bool = True) -> Detections:
    filled = [rectangle_mask(SIZE, tuple(int(edge) for edge in box)) for box in boxes]
    return Detections(
        SIZE,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(scores, np.float32),
        np.array(filled, bool).reshape(-1, *SIZE) if masks else None,
    )


def random_pair(seed: int) -> Pair:
    """Some objects and detections near them, of the right class or not, and some anywhere."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 90, (6, 2))
    sides = rng.integers(4, 60, (6, 2)) if seed % 2 else rng.integers(4, 110, (6, 2))
    boxes = np.concatenate([corners, np.minimum(corners + sides, (199, 149))], axis=1)
    target = rectangles(SIZE, [tuple(box) for box in boxes], list(rng.integers(0, 2, 6)))
    moved = np.clip(boxes[rng.integers(0, 6, 12)] + rng.integers(-6, 7, (12, 4)), 0, (199, 149, 199, 149))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    return detections(moved, rng.integers(0, 2, 12), rng.random(12).round(2)), target


def pycocotools_stats(pairs: dict[str, Pair], kind: str) -> list[float]:
    """The summary of COCO's own evaluation, from entries as its files hold them."""
    images, truth, found = [], [], []
    for idx, (_, (prediction, target)) in enumerate(sorted(pairs.items()), start=1):
        images.append({"id": idx, "height": SIZE[0], "width": SIZE[1]})
        for row, (left, top, right, bottom) in enumerate(target.boxes.tolist()):
            code = coco_mask.encode(np.asfortranarray(target.masks[row].astype(np.uint8)))
            area = coco_mask.area(code) if target.areas is None else target.areas[row]
            entry = {"id": len(truth) + 1, "image_id": idx, "category_id": int(target.classes[row]), "area": area}
            entry |= {"bbox": [left, top, right - left, bottom - top], "segmentation": code}
            truth.append(entry | {"iscrowd": int(not target.counts[row])})
        for row, (left, top, right, bottom) in enumerate(prediction.boxes.tolist()):
            entry = {"image_id": idx, "category_id": int(prediction.classes[row]), "score": prediction.scores[row]}
            code = coco_mask.encode(np.asfortranarray(prediction.masks[row].astype(np.uint8)))
            shown = {"segmentation": code} if kind == "segm" else {"bbox": [left, top, right - left, bottom - top]}
            found.append(entry | shown)
    dataset = COCO()
    dataset.dataset = {
        "info": {},
        "images": images,
        "annotations": truth,
        "categories": [{"id": number, "name": name} for number, name in enumerate(TABLE.names)],
    }
    dataset.createIndex()
    evaluation = COCOeval(dataset, dataset.loadRes(found), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def scored(pairs: dict[str, Pair]) -> CocoScores:
    scores = CocoScores(TABLE)
    for key, (prediction, target) in pairs.items():
        scores.add(key, prediction, target)
    return scores


CROWD = (
    detections([(10, 10, 60, 60), (15, 15, 40, 40), (100, 20, 140, 70), (150, 100, 190, 140)], [0] * 4, [0.9] * 4),
    rectangles(SIZE, [(5, 5, 90, 90), (100, 20, 140, 72)], [0, 0], crowd=[True, False]),
)
EMPTY = (detections([(10, 10, 60, 60)], [1], [0.8]), rectangles(SIZE, [], []))
NOTHING = (detections([], [], []), rectangles(SIZE, [(20, 20, 50, 50)], [1]))
MANY = (
    detections([(x, y, x + 9, y + 9) for x in range(0, 190, 10) for y in range(0, 140, 12)], [0] * 228, [0.5] * 228),
    rectangles(SIZE, [(180, 0, 189, 9), (0, 0, 9, 9)], [0, 0]),
)
STATED = (NOTHING[0], Instances(**{**vars(NOTHING[1]), "areas": np.array([20000.0])}))
CASES = {
    "random": {f"{seed}.jpg": random_pair(seed) for seed in range(6)},
    "crowds": {"a": CROWD, "b": random_pair(1)},
    "images without objects or detections": {"a": EMPTY, "b": NOTHING, "c": random_pair(2)},
    "more than 100 detections": {"a": MANY, "b": random_pair(3)},
    "sizes as the data set states them": {"a": STATED, "b": random_pair(4)},
}


@pytest.mark.parametrize("pairs", CASES.values(), ids=CASES.keys())
def test_scores_equal_those_of_pycocotools(pairs) -> None:
    scores = scored(pairs).scores()
    found = {"box AP": scores.value, **scores.others}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats = dict(zip(NAMES, pycocotools_stats(pairs, kind), strict=True))
        for measure, value in stats.items():
            if value < 0:
                assert f"{name} {measure}" not in found
            else:
                assert found[f"{name} {measure}"] == pytest.approx(value, abs=1e-12), (name, measure)
    assert scores.by_class["box AP"]["never"] is None
    known = [value for value in scores.by_class["box AP"].values() if value is not None]
    assert scores.value == pytest.approx(np.mean(known))


def test_ranks_join_their_images_and_one_seen_twice_counts_once() -> None:
    pairs = CASES["random"]
    whole, parts = scored(pairs), [scored(dict(list(pairs.items())[start:end])) for start, end in ((2, 6), (0, 3))]
    joined = pickle.loads(pickle.dumps(parts[0]))
    joined.merge(parts[1])
    assert joined.scores() == whole.scores()


def test_images_are_kept_as_codes_and_take_little_memory() -> None:
    """100 masks of 1280 x 720 px are 92 MB."""
    size, boxes = (720, 1280), np.array([(x, y, x + 200, y + 180) for x in range(0, 1000, 50) for y in range(5)])
    masks = np.stack([rectangle_mask(size, tuple(box)) for box in boxes])
    scores = CocoScores(TABLE)
    scores.add("a", Detections(size, boxes, np.zeros(100, int), np.ones(100), masks), rectangles(size, [], []))
    assert masks.nbytes > 90e6 and len(pickle.dumps(scores)) < 2e5
    assert len(json.dumps(scores.images["a"].found)) < 2e5


def test_boxes_alone_have_no_mask_precision() -> None:
    boxes = [(10, 10, 60, 60)]
    target = rectangles(SIZE, boxes, [0], masks=False)
    scores = scored({"a": (detections(boxes, [0], [0.9], masks=False), target)}).scores()
    assert scores.value == 1.0 and scores.by_class.keys() == {"box AP"}
    assert scores.others["box AP medium"] == 1.0 and "box AP small" not in scores.others
    assert not any(name.startswith("mask") for name in scores.others)


def test_images_without_any_object_that_counts_are_refused() -> None:
    crowd = rectangles(SIZE, [(5, 5, 90, 90)], [0], crowd=[True])
    with pytest.raises(InputError, match="of 2 held-out images, none holds an object that counts"):
        scored({"a": EMPTY, "b": (EMPTY[0], crowd)}).scores()
