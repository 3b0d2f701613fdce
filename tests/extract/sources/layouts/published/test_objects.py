"""Published objects against what was painted, and against pycocotools and torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Instances
from parts import published_trees as trees
from parts.images import png, write_files
from parts.paths import SHARED
from parts.published_trees import HEIGHT, LEFT, UP, WIDTH, painted, rgba

PX = (HEIGHT, WIDTH)
BITMASK = "labels/ins_seg/bitmasks/train/a.png"
PYCOCOTOOLS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COCO98 = SHARED / "data" / "coco98"


def opened(layout: str, root: Path, split: str) -> LabelledSource:
    labelled = open_layout(f"{layout}:{root}@{split}")
    assert labelled is not None and labelled.kind is Instances
    return labelled


def objects(labelled: LabelledSource, row: int = 0, px: tuple[int, int] = PX) -> Instances:
    target = labelled.target(row, px)
    assert isinstance(target, Instances)
    return target


def by_class(labelled: LabelledSource, read: Instances) -> dict[str, list[tuple[list[float], bool]]]:
    """Boxes and crowd of the objects of each class, by its name."""
    assert read.crowd is not None
    found: dict[str, list[tuple[list[float], bool]]] = {}
    for box, number, crowd in zip(read.boxes.tolist(), read.classes, read.crowd.tolist(), strict=True):
        found.setdefault(labelled.classes.names[number], []).append((box, crowd))
    return found


def check_masks(read: Instances) -> None:
    """Boxes and areas are those of the masks, counted here pixel by pixel."""
    assert read.masks is not None and read.areas is not None
    for mask, box, area in zip(read.masks, read.boxes.tolist(), read.areas, strict=True):
        places = np.argwhere(mask)
        (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
        assert box == [left, top, right + 1, bottom + 1] and area == len(places)


def test_bdd100k_bitmasks_hold_class_attributes_and_object(tmp_path: Path) -> None:
    """Two cars that differ in the high byte, a crowd, an ignored one without a number, an occluded one that counts."""
    labelled = opened("bdd100k-ins", write_files(tmp_path, trees.bdd100k_ins()), "train")
    read = objects(labelled)
    found = by_class(labelled, read)
    assert {name: sorted(rows) for name, rows in found.items()} == {
        "car": [([0, 0, 4, 3], False), ([8, 0, 12, 3], False)],
        "bicycle": [([0, 5, 4, 8], True)],
        "pedestrian": [([8, 5, 12, 8], True)],
        "rider": [([0, 3, 4, 5], False)],
    }
    check_masks(read)
    assert labelled.classes.numbers[2] == 3


def test_an_image_of_background_has_no_objects(tmp_path: Path) -> None:
    blank = png(painted(value=trees.BDD_BLANK, channels=4))
    read = objects(opened("bdd100k-ins", write_files(tmp_path, {**trees.bdd100k_ins(), BITMASK: blank}), "train"))
    assert len(read) == 0 and read.size_px == PX
    assert read.masks is not None and read.masks.shape == (0, *PX) and read.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(painted((UP, LEFT, rgba(9, 1)), channels=4)), "a.png holds the class 9, and there are 8"),
        (png(trees.picture(1)), "has 3 channels, and the published file has 4"),
    ],
)
def test_another_bitmask_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    labelled = opened("bdd100k-ins", write_files(tmp_path, {**trees.bdd100k_ins(), BITMASK: data}), "train")
    with pytest.raises(InputError, match=message):
        objects(labelled)


def test_cityscapes_objects_are_those_of_torchvision_and_groups_are_crowds(tmp_path: Path) -> None:
    from torchvision.datasets import Cityscapes

    root = write_files(tmp_path, trees.cityscapes())
    labelled = opened("cityscapes-ins", root, "val")
    read = objects(labelled)
    assert by_class(labelled, read) == {  # a caravan is no class
        "person": [([8, 5, 12, 8], True)],
        "car": [([0, 0, 2, 3], False), ([2, 0, 4, 3], False)],
        "bicycle": [([0, 3, 4, 5], False)],
    }
    check_masks(read)
    assert labelled.classes.names == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert list(labelled.classes.numbers.values()) == [24, 25, 26, 27, 28, 31, 32, 33]
    (root / "leftImg8bit" / "val" / "lonely_leftImg8bit.png").unlink()
    theirs = np.asarray(Cityscapes(str(root), split="val", target_type="instance")[0][1])
    assert read.masks is not None
    for mask, value in zip(read.masks, (24, 26000, 26001, 33012), strict=True):
        np.testing.assert_array_equal(mask, theirs == value)


def test_a_value_of_no_class_of_cityscapes_is_refused(tmp_path: Path) -> None:
    name = f"gtFine/val/{trees.CITY}_gtFine_instanceIds.png"
    files = {**trees.cityscapes(), name: png(painted((UP, LEFT, 34001), dtype=np.uint16))}
    with pytest.raises(InputError, match=f"{name} holds the value 34001, which is of no class"):
        objects(opened("cityscapes-ins", write_files(tmp_path, files), "val"))


def test_voc_objects_have_the_class_of_their_pixels(tmp_path: Path) -> None:
    labelled = opened("voc-ins", write_files(tmp_path, trees.voc()), "train")
    read = objects(labelled)
    assert by_class(labelled, read) == {
        "tvmonitor": [([1, 1, 3, 2], False)],
        "aeroplane": [([8, 5, 12, 8], False), ([0, 5, 4, 8], False)],
    }
    check_masks(read)


def test_a_voc_object_whose_class_is_blurred_at_the_border_has_that_of_most_pixels(tmp_path: Path) -> None:
    classes = trees.VOC_MASK.copy()
    classes[5, 8], classes[6, 8] = 255, 15
    files = {**trees.voc(), "SegmentationClass/2007_000032.png": trees.palette_png(classes)}
    labelled = opened("voc-ins", write_files(tmp_path, files), "train")
    assert sorted(by_class(labelled, objects(labelled))) == ["aeroplane", "tvmonitor"]


def test_a_voc_object_without_a_class_or_a_file_is_refused(tmp_path: Path) -> None:
    files = {**trees.voc(), "SegmentationClass/2007_000032.png": trees.palette_png(painted())}
    labelled = opened("voc-ins", write_files(tmp_path / "a", files), "train")
    with pytest.raises(InputError, match=r"SegmentationObject/2007_000032.png: object 1 is of no class"):
        objects(labelled)
    del files["SegmentationObject/2007_000001.png"]
    with pytest.raises(InputError, match=r"there is no SegmentationObject/2007_000001.png"):
        opened("voc-ins", write_files(tmp_path / "b", files), "trainval")


# --- COCO ------------------------------------------------------------------------------------------------------------


def check_against_pycocotools(labelled: LabelledSource, file: Path) -> int:
    """Each object's class, crowd, box, area and mask; how many there are."""
    from pycocotools.coco import COCO

    theirs = COCO(str(file))
    by_name = {image["file_name"]: image for image in theirs.dataset["images"]}
    num = 0
    for row, item in enumerate(labelled.items):
        image = by_name[item.key]
        read = objects(labelled, row, (image["height"], image["width"]))
        annotations = theirs.loadAnns(theirs.getAnnIds(image["id"]))
        assert len(read) == len(annotations) and read.masks is not None and read.crowd is not None
        assert read.areas is not None
        for idx, annotation in enumerate(annotations):
            x, y, width, height = annotation["bbox"]
            assert labelled.classes.numbers[int(read.classes[idx])] == annotation["category_id"]
            assert read.crowd[idx] == bool(annotation["iscrowd"])
            np.testing.assert_allclose(read.boxes[idx], [x, y, x + width, y + height])
            assert read.areas[idx] == annotation["area"]
            np.testing.assert_array_equal(read.masks[idx], theirs.annToMask(annotation).astype(bool))
            num += 1
    return num


@PYCOCOTOOLS
def test_coco_objects_are_those_of_pycocotools(tmp_path: Path) -> None:
    root = write_files(tmp_path, trees.coco())
    labelled = opened("coco", root, "val2017")
    assert labelled.classes.names == ("person", "stop sign", "toothbrush")
    assert labelled.classes.numbers == {0: 1, 1: 13, 2: 90}
    assert [item.key for item in labelled.items] == ["000000000139.jpg", "000000000285.jpg"]
    assert len(objects(labelled, 1)) == 0
    assert objects(labelled).occurring == {2}  # the person is a crowd
    assert check_against_pycocotools(labelled, root / "annotations" / "instances_val2017.json") == 2
    assert len(labelled.notes()) == 1 and "000000000632.jpg" in labelled.notes()[0]


@pytest.mark.skipif(not COCO98.is_dir(), reason=f"the 98 images of COCO are not at {COCO98}")
@PYCOCOTOOLS
def test_real_coco_objects_are_those_of_pycocotools() -> None:
    labelled = opened("coco", COCO98, "train2017")
    assert len(labelled.items) == 98 and len(labelled.classes) == 80
    assert max(labelled.classes.numbers.values()) == 90
    assert check_against_pycocotools(labelled, COCO98 / "annotations" / "instances_train2017.json") == 746


def test_a_split_of_coco_is_any_that_has_a_file(tmp_path: Path) -> None:
    files = {name.replace("val2017", "mine"): data for name, data in trees.coco().items()}
    assert len(opened("coco", write_files(tmp_path, files), "mine").items) == 2
    with pytest.raises(
        InputError, match=r"there is no val2017; it holds annotations, mine|no annotations/instances_val"
    ):
        opened("coco", tmp_path, "val2017")


def test_images_of_another_size_than_coco_says_are_refused(tmp_path: Path) -> None:
    labelled = opened("coco", write_files(tmp_path, trees.coco()), "val2017")
    with pytest.raises(InputError, match=r"000000000139.jpg .*12x8 .*11x8"):
        objects(labelled, px=(8, 11))


def test_json_of_another_kind_is_refused(tmp_path: Path) -> None:
    name = "annotations/instances_val2017.json"
    for data in (b"[]", b"{", json.dumps({"images": []}).encode()):
        root = write_files(tmp_path, {**trees.coco(), name: data})
        with pytest.raises(InputError, match=name):
            opened("coco", root, "val2017")
