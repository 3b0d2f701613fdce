"""Published segments against what was painted, and the formula of panopticapi."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Panoptic
from parts import published_trees as trees
from parts.images import png, write_files
from parts.published_trees import DOWN, HEIGHT, LEFT, RIGHT, UP, WIDTH, painted, rgba

PX = (HEIGHT, WIDTH)
JSON = "annotations/panoptic_val2017.json"


def opened(layout: str, root: Path, split: str = "val") -> LabelledSource:
    labelled = open_layout(f"{layout}:{root}@{split}")
    assert labelled is not None and labelled.kind is Panoptic
    return labelled


def segments(labelled: LabelledSource) -> Panoptic:
    target = labelled.target(0, PX)
    assert isinstance(target, Panoptic)
    assert target.segments.dtype == np.int32 and target.segments.shape == PX
    assert set(np.unique(target.segments).tolist()) - {0} == set(target.classes)  # each is shown, each has a class
    assert target.crowd <= set(target.classes)
    return target


def by_place(labelled: LabelledSource, read: Panoptic) -> dict[str, tuple[str, bool]]:
    """Class and crowd of the segment in each corner and beside it."""
    places = {"up left": (0, 0), "up right": (0, 11), "down left": (7, 0), "down right": (7, 11), "left": (4, 0)}
    found = {}
    for name, place in places.items():
        own = int(read.segments[place])
        found[name] = ("", False) if own == 0 else (labelled.classes.names[read.classes[own]], own in read.crowd)
    return found


def test_coco_segments_are_ids_of_three_bytes(tmp_path: Path) -> None:
    labelled = opened("coco-panoptic", write_files(tmp_path, trees.coco_panoptic()), "val2017")
    read = segments(labelled)
    np.testing.assert_array_equal(read.segments, trees.PANOPTIC_IDS)
    assert labelled.classes.names == ("person", "toothbrush", "rug-merged")
    assert labelled.classes.things == {0, 1} and labelled.classes.numbers == {0: 1, 1: 90, 2: 200}
    assert read.classes == {2: 0, 257: 2, 70000: 0} and read.crowd == {2}  # 5, which no pixel shows, is none
    assert labelled.notes() == (
        "left out 1 image of val2017 without a label in annotations/panoptic_val2017: 000000000632.jpg",
        "left out 1 image listed without image or PNG: 000000000285.jpg",
    )


def test_bdd100k_segments_are_objects_and_one_of_each_stuff(tmp_path: Path) -> None:
    labelled = opened("bdd100k-pan", write_files(tmp_path, trees.bdd100k_pan()))
    read = segments(labelled)
    assert by_place(labelled, read) == {
        "up left": ("car", False),
        "up right": ("car", False),
        "down left": ("person", True),
        "down right": ("road", False),
        "left": ("road", False),
    }
    assert len(read.classes) == 4
    assert read.segments[0, 0] != read.segments[0, 11] and read.segments[7, 11] == read.segments[4, 0]
    assert (read.segments[3, 5], len(labelled.classes.things)) == (0, 10)


def test_cityscapes_segments_leave_out_what_is_not_scored(tmp_path: Path) -> None:
    labelled = opened("cityscapes-pan", write_files(tmp_path, trees.cityscapes()))
    read = segments(labelled)
    assert by_place(labelled, read) == {
        "up left": ("car", False),
        "up right": ("road", False),
        "down left": ("", False),  # a caravan
        "down right": ("person", True),  # a group
        "left": ("bicycle", False),
    }
    assert read.classes == {7: 0, 24: 11, 26000: 13, 26001: 13, 33012: 18}


def test_another_bitmask_is_refused(tmp_path: Path) -> None:
    name = "labels/pan_seg/bitmasks/val/a.png"
    files = {**trees.bdd100k_pan(), name: png(painted((UP, LEFT, rgba(41, 1)), channels=4))}
    with pytest.raises(InputError, match=f"{name} holds the class 41, and there are 40"):
        opened("bdd100k-pan", write_files(tmp_path, files)).target(0, PX)


def coco_with(**changes: Any) -> dict[str, bytes]:
    files = trees.coco_panoptic()
    return {**files, JSON: json.dumps({**json.loads(files[JSON]), **changes}).encode()}


def annotation(**changes: Any) -> dict[str, Any]:
    segment = {"id": 1, "category_id": 1, "iscrowd": 0}
    return {"image_id": 139, "file_name": "000000000139.png", "segments_info": [segment], **changes}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**trees.coco_panoptic(), JSON: b"{"}, "is no file of panoptic annotations"),
        ({**trees.coco_panoptic(), JSON: b'{"images": []}'}, "is no file of panoptic annotations"),
        (coco_with(images=[]), "lists no image"),
        (coco_with(annotations=[]), "no annotations in it"),
        (coco_with(annotations=[annotation(), annotation()]), "annotates 000000000139.jpg twice"),
        (coco_with(annotations=[annotation(image_id=140)]), "of an image that is not listed: 140 is not there"),
        (coco_with(annotations=[annotation(segments_info=[{"id": 1, "category_id": 3}])]),
         "000000000139.jpg: segment 1 is of category 3, which the file does not list"),
        (coco_with(annotations=[annotation(segments_info=[{"id": 1}])]), "not as published, .*: 'category_id' is not"),
        (coco_with(annotations=[annotation(segments_info=[{"id": "a", "category_id": 1}])]), "not as published.*'a'"),
        (coco_with(annotations=[annotation(segments_info=[{"id": math.inf, "category_id": 1}])]),
         f"{JSON}: an entry is not as published, .*: segment id inf is no whole number; fetch it again"),
        (coco_with(annotations=[annotation(segments_info=[{"id": 1.5, "category_id": 1}])]), "segment id 1.5 is no"),
        (coco_with(annotations=[annotation(segments_info=7)]), "an entry is not as published, .*: 'int' object is"),
        (coco_with(categories=[{"id": 1, "name": "person"}]), "category 1 has no isthing"),
        (coco_with(categories=[{"id": own, "name": "a", "isthing": 1} for own in (1, 2)]), "a is the name of two"),
        (coco_with(images=[{"id": own, "file_name": "a.jpg"} for own in (139, 285)]), "lists an image or an id twice"),
        (coco_with(images=[{"id": own, "file_name": f"{own}.jpg"} for own in (139, 285)]),
         "none of the 2 images that the JSON file lists is there with its PNG; val2017 holds 000000000139.jpg, "),
    ],
)  # fmt: skip
def test_json_that_is_not_as_published_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened("coco-panoptic", write_files(tmp_path, files), "val2017")


def test_a_png_of_other_segments_than_the_json_is_refused(tmp_path: Path) -> None:
    rgb = painted((DOWN, RIGHT, (1, 1, 0)), (UP, LEFT, (9, 0, 0)), (DOWN, LEFT, (8, 0, 0)), channels=3)
    files = {**trees.coco_panoptic(), "annotations/panoptic_val2017/000000000139.png": png(rgb)}
    labelled = opened("coco-panoptic", write_files(tmp_path, files), "val2017")
    with pytest.raises(InputError, match=r"000000000139.png shows 2 segments that the JSON file does not list, 8 for"):
        labelled.target(0, PX)
