"""Targets with objects and segments: of digit scenes, and of rectangles by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtpipe.distill.downstream.extractors import random_student
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.predictions import Detections, PanopticPrediction
from dtpipe.distill.downstream.tuned.tasks.detect import coco_entries
from dtpipe.distill.downstream.tuned.tasks.panoptic import segments_info, segments_png
from dtpipe.distill.student.student import Student, StudentSpec
from dtpipe.manifests.labels import ClassTable, Instances, Panoptic
from dtpipe.pipeline.demo.scenes import Scene, iterate_scenes
from parts.coco import packed_runs
from parts.images import png, write_files

DIGITS = ClassTable(tuple("0123456789"))
DIGITS_ON_GROUND = ClassTable((*DIGITS.names, "ground"), frozenset(range(10)))
SMALL_HEAD = {"width": 32, "anchor_scale": 4.0, "samples": 32, "min_stuff_px": 16}

Rectangle = tuple[int, int, int, int]


def small_config(head: dict[str, Any] | None = None, **settings: Any) -> TuneConfig:
    """Settings of a head for 64 px."""
    return TuneConfig(steps=1, head={**SMALL_HEAD, **(head or {})}, **settings)


def rectangle_mask(size_px: tuple[int, int], box: Rectangle) -> np.ndarray:
    left, top, right, bottom = box
    mask = np.zeros(size_px, bool)
    mask[top:bottom, left:right] = True
    return mask


def rectangles(
    size_px: tuple[int, int],
    boxes: Sequence[Rectangle],
    classes: Sequence[int],
    crowd: Sequence[bool] | None = None,
    masks: bool = True,
) -> Instances:
    """Objects that fill their boxes; left, top, right, bottom."""
    filled = np.zeros((len(boxes), *size_px), bool)
    for mask, box in zip(filled, boxes, strict=True):
        mask |= rectangle_mask(size_px, box)
    return Instances(
        size_px,
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(classes, np.int64),
        filled if masks else None,
        None if crowd is None else np.array(crowd, bool),
    )


def scene_objects(scene: Scene) -> Instances:
    """The digits of a scene."""
    masks = [scene.instance == number for number in np.unique(scene.instance) if number > 0]
    boxes = [(np.argwhere(mask).min(axis=0)[::-1], np.argwhere(mask).max(axis=0)[::-1] + 1) for mask in masks]
    classes = [int(scene.semantic[mask].min()) - 1 for mask in masks]
    return Instances(scene.instance.shape, np.array(boxes, float).reshape(-1, 4), np.array(classes), np.stack(masks))


def scene_segments(scene: Scene) -> Panoptic:
    """The digits of a scene as things, and the photograph under them as stuff."""
    classes = {1: len(DIGITS)}
    for number in np.unique(scene.instance[scene.instance > 0]).tolist():
        classes[number + 1] = int(scene.semantic[scene.instance == number].min()) - 1
    return Panoptic(scene.instance.astype(np.int32) + 1, classes)


def learned(target: Instances) -> dict[str, torch.Tensor]:
    """Objects as a detector takes them."""
    return {
        "boxes": torch.from_numpy(target.boxes).float(),
        "labels": torch.from_numpy(target.classes + 1),
        "masks": torch.from_numpy(target.masks.astype(np.uint8)),
    }


OVERFIT = {
    **{"steps": 50, "batch_size": 3, "lr": 5e-3, "weight_decay": 0.01, "clip_grad": 5.0},
    "augment": {"flip": 0},
    "run": {"save_every": 1000},
}
"""Settings with which a head learns three scenes by heart."""


def with_targets(images: np.ndarray, targets: Sequence[Instances | Panoptic], classes: ClassTable) -> LabelledSet:
    keys = tuple(f"{idx}.png" for idx in range(len(images)))
    return LabelledSet(keys, type(targets[0]), classes, lambda row: images[row], lambda row: targets[row])


def scene_set(classes: ClassTable, read: Callable[[Scene], Instances | Panoptic], num: int = 3) -> LabelledSet:
    """Digit scenes of 64 px with what is read of them."""
    scenes = list(iterate_scenes(num, 3))
    return with_targets(np.stack([scene.image for scene in scenes]), [read(scene) for scene in scenes], classes)


def scene_student() -> Student:
    return random_student(StudentSpec("resnet10t", 4, (64, 64)), 0)


def write_scenes_as_coco(root: Path, num: int, split: str = "train2017") -> Path:
    """Digit scenes with their objects and their segments as COCO is published; the root."""
    files: dict[str, bytes] = {}
    images, objects, maps = [], [], []
    for idx, scene in enumerate(iterate_scenes(num, 3)):
        name, segments = f"{idx:012d}", scene_segments(scene)
        truth = scene_objects(scene)
        found = Detections((64, 64), truth.boxes, truth.classes, np.ones(len(truth)))
        images.append({"id": idx, "file_name": f"{name}.jpg", "height": 64, "width": 64})
        for entry, mask in zip(coco_entries(found, DIGITS), truth.masks, strict=True):
            own = {"id": len(objects) + 1, "image_id": idx, "iscrowd": 0, "area": int(mask.sum())}
            objects.append({**entry, **own, "segmentation": packed_runs(mask)})
        info = segments_info(PanopticPrediction(segments.segments, segments.classes), DIGITS_ON_GROUND)
        maps.append({"image_id": idx, "file_name": f"{name}.png", "segments_info": [{**s, "iscrowd": 0} for s in info]})
        files |= {
            f"{split}/{name}.jpg": png(scene.image),
            f"annotations/panoptic_{split}/{name}.png": segments_png(segments.segments),
        }
    classes = [
        {"id": number, "name": name, "isthing": number < 10} for number, name in enumerate(DIGITS_ON_GROUND.names)
    ]
    for kind, entries, categories in (("instances", objects, classes[:10]), ("panoptic", maps, classes)):
        document = {"images": images, "annotations": entries, "categories": categories}
        files[f"annotations/{kind}_{split}.json"] = json.dumps(document).encode()
    return write_files(root, files)
