"""A small file in COCO's format with every form of segmentation, and its images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parts.images import draw_image, png, write_files

SIDE = 24  # px of both images
CATEGORIES = ({"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 7, "name": "bird"})
POLYGONS = [[2.5, 3.0, 11.25, 4.0, 10.0, 13.6, 3.1, 12.0], [14, 14, 20, 14, 20, 20]]


def coco_document(**changes: Any) -> dict[str, Any]:
    """Image 10, `b.png`, holds polygons of two parts, run lengths as numbers, and a crowd; `a.png` holds nothing."""
    runs = [30, 5, 19, 5, 19, 5, SIDE * SIDE - 83]
    crowd = {"size": [SIDE, SIDE], "counts": "f1b06000R>"}
    rest = {"image_id": 10, "iscrowd": 0}
    document: dict[str, Any] = {
        "images": [image_entry(10, "b.png"), image_entry(9, "a.png")],
        "categories": list(CATEGORIES),
        "annotations": [
            {**rest, "id": 1, "category_id": 90, "bbox": [2.5, 3, 17.5, 17], "area": 88.5, "segmentation": POLYGONS},
            {
                **rest,
                "id": 2,
                "category_id": 3,
                "bbox": [1, 6, 3, 5],
                "area": 15,
                "segmentation": {"size": [SIDE, SIDE], "counts": runs},
            },
            {**rest, "id": 3, "category_id": 3, "iscrowd": 1, "bbox": [2, 6, 3, 18], "area": 54, "segmentation": crowd},
        ],
    }
    return {**document, **changes}


def image_entry(number: int, name: str, side: int = SIDE) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": side, "width": side}


def write_coco(root: Path, document: Mapping[str, Any], images: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    """`labels.json` beside images; the folder."""
    files = {name: png(draw_image(idx, SIDE)) for idx, name in enumerate(images)}
    return write_files(root, {**files, "labels.json": json.dumps(document).encode()})


def packed_runs(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as pycocotools packs it, as JSON holds it."""
    from pycocotools import mask as coco_mask

    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(packed["size"]), "counts": packed["counts"].decode()}
