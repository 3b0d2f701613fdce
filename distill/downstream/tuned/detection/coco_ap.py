"""Average precision of boxes and masks as COCO's own evaluation has it, by faster-coco-eval.

Source: Lin et al., arXiv 1405.0312; cocodataset/cocoapi `PythonAPI/pycocotools/cocoeval.py`, whose numbers these equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from dtpipe.distill.downstream.tuned.base import Metric, TaskScores
from dtpipe.distill.downstream.tuned.detection.rle import coco_boxes, encode_masks
from dtpipe.distill.downstream.tuned.predictions import Detections
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Instances, Target
from dtpipe.manifests.words import count_of

_NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
_RECALLS = ("AR1", "AR10", "AR100", "AR small", "AR medium", "AR large")
_KINDS = {"bbox": "box", "segm": "mask"}
BOX_AP = "box AP"

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class ScoredImage:
    """Truth and predictions of one image as COCO's entries, without ids; masks are run-length codes."""

    size_px: tuple[int, int]
    truth: Entries
    found: Entries
    masks: bool
    """Both sides have masks."""


@dataclass
class CocoScores:
    """Images by key, so that one that several ranks have seen counts once. Memory: about 1 kB per object."""

    classes: ClassTable
    images: dict[str, ScoredImage] = field(default_factory=dict)

    def add(self, key: str, prediction: Detections, target: Target) -> None:
        """Take in an image; of its crowds, only what detections fall on is looked at."""
        assert isinstance(target, Instances)
        masks = target.masks is not None and prediction.masks is not None
        found = _detections(prediction, masks)
        self.images[key] = ScoredImage(target.size_px, _objects(target, masks), found, masks)

    def merge(self, other: Metric[Detections]) -> None:
        """Take in the images of another."""
        assert isinstance(other, CocoScores)
        self.images |= other.images

    def scores(self) -> TaskScores:
        """Box AP, and all of COCO's summary; masks where every image has them.

        Raises: InputError when no object counts.
        """
        if not any(not entry["iscrowd"] for image in self.images.values() for entry in image.truth):
            raise InputError(
                f"of {count_of(len(self.images), 'held-out image')}, none holds an object that counts; "
                "give held-out images with objects of the classes that were learned"
            )
        others: dict[str, float] = {}
        by_class: dict[str, dict[str, float | None]] = {}
        masked = all(image.masks for image in self.images.values())
        for kind in ("bbox", "segm") if masked else ("bbox",):
            name, evaluation = _KINDS[kind], self._evaluate(kind)
            named = zip((*_NAMES, *_RECALLS), evaluation.stats, strict=False)
            others |= {f"{name} {measure}": float(value) for measure, value in named if value >= 0}
            by_class[f"{name} AP"] = self._by_class(evaluation)
        return TaskScores(others.pop(BOX_AP), others, by_class)

    def _evaluate(self, kind: str) -> COCOeval_faster:
        truth, found = (self._dataset(side, kind) for side in ("truth", "found"))
        evaluation = COCOeval_faster(truth, found, kind, print_function=_silent)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    def _dataset(self, side: str, kind: str) -> COCO:
        """One side as COCO's own class has it. A detection's size is that of its box or of its mask, as scored."""
        images: Entries = []
        entries: Entries = []
        for idx, (_, image) in enumerate(sorted(self.images.items()), start=1):
            images.append({"id": idx, "height": image.size_px[0], "width": image.size_px[1]})
            for entry in image.truth if side == "truth" else image.found:
                area = entry["area"] if side == "truth" else entry["areas"][kind]
                entries.append({**entry, "area": area, "image_id": idx, "id": len(entries) + 1})
        categories = [{"id": number, "name": name} for number, name in enumerate(self.classes.names)]
        dataset = COCO(print_function=_silent)
        dataset.dataset = {"images": images, "annotations": entries, "categories": categories}
        dataset.createIndex()
        return dataset

    def _by_class(self, evaluation: COCOeval_faster) -> dict[str, float | None]:
        """AP of each class over all areas, at 100 detections. The precisions are (IoUs, recalls, classes, areas, 3)."""
        table: dict[str, float | None] = {}
        for name, precision in zip(self.classes.names, np.moveaxis(evaluation.eval["precision"], 2, 0), strict=True):
            values = precision[:, :, 0, -1]
            table[name] = float(values.mean()) if (values >= 0).any() else None
        return table


def _silent(*_lines: object) -> None:
    pass


def _objects(target: Instances, masks: bool) -> Entries:
    own = target.masks.sum(axis=(1, 2)) if target.masks is not None else None
    boxes = coco_boxes(target.boxes)
    areas = target.areas if target.areas is not None else own
    sizes = [box[2] * box[3] for box in boxes] if areas is None else areas.tolist()
    codes = encode_masks(target.masks) if masks and target.masks is not None else [None] * len(target)
    rows = zip(boxes, target.classes.tolist(), sizes, ~target.counts, codes, strict=True)
    return [
        {"bbox": box, "category_id": number, "area": float(area), "iscrowd": int(crowd), **_coded(code)}
        for box, number, area, crowd, code in rows
    ]


def _detections(prediction: Detections, masks: bool) -> Entries:
    boxes, num = coco_boxes(prediction.boxes), len(prediction.classes)
    codes: list[dict[str, Any] | None] = [None] * num
    pixels = [0] * num
    if masks and prediction.masks is not None:
        codes = list(encode_masks(prediction.masks))
        pixels = prediction.masks.sum(axis=(1, 2)).tolist()
    rows = zip(boxes, prediction.classes.tolist(), prediction.scores.tolist(), pixels, codes, strict=True)
    return [
        {
            "bbox": box,
            "category_id": number,
            "score": score,
            "iscrowd": 0,
            "areas": {"bbox": box[2] * box[3], "segm": float(size)},
            **_coded(code),
        }
        for box, number, score, size, code in rows
    ]


def _coded(code: dict[str, Any] | None) -> dict[str, Any]:
    return {} if code is None else {"segmentation": code}
