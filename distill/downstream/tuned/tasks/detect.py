"""Object detection and instance segmentation: Mask R-CNN or its cascade, scored by COCO's average precision."""

from __future__ import annotations

import json
from collections.abc import Iterator

from torch import nn

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.detection.coco_ap import BOX_AP, CocoScores
from dtpipe.distill.downstream.tuned.detection.rle import coco_boxes, encode_masks
from dtpipe.distill.downstream.tuned.detection.views import InstanceViews
from dtpipe.distill.downstream.tuned.heads.detector import Detector
from dtpipe.distill.downstream.tuned.predictions import Detections
from dtpipe.distill.downstream.tuned.reads import OBJECTS_READ
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable, Instances


def build_detector(student: Student, classes: ClassTable, config: TuneConfig) -> nn.Module:
    """A detector of all classes. Raises: ConfigError when there is no class; as `Detector`."""
    if not classes:
        raise ConfigError("the labels name no class of objects to detect; give labels with classes")
    return Detector(student, len(classes), config)


def coco_entries(prediction: Detections, classes: ClassTable) -> list[dict[str, object]]:
    """What COCO's result files hold of an image, but its `image_id`; classes under the data set's own numbers."""
    masks = [] if prediction.masks is None else encode_masks(prediction.masks)
    entries: list[dict[str, object]] = []
    for idx, box in enumerate(coco_boxes(prediction.boxes)):
        number, score = int(prediction.classes[idx]), round(float(prediction.scores[idx]), 5)
        entry = {"category_id": classes.numbers.get(number, number), "bbox": [round(edge, 2) for edge in box]}
        entries.append({**entry, "score": score, **({"segmentation": masks[idx]} if masks else {})})
    return entries


def _save(prediction: Detections, classes: ClassTable) -> Iterator[tuple[str, bytes]]:
    yield ".json", json.dumps(coco_entries(prediction, classes)).encode()


TASK: TunedTask[Detections] = TunedTask(
    name="detect",
    summary="from objects: Mask R-CNN with FPN, or its cascade, trained with the backbone; COCO's average precision",
    kind=Instances,
    metric_name=BOX_AP,
    build=build_detector,
    augment=lambda _classes, config: InstanceViews(config),
    metric=lambda classes, _config: CocoScores(classes),
    save=_save,
    reads=OBJECTS_READ,
    crops=False,
)
