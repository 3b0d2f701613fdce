"""Files in COCO's format: objects are those of pycocotools; what is wrong with a file is named."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dtpipe.extract.sources.layouts.coco_json import CocoTargets, parse_coco
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Instances
from parts.coco import CATEGORIES, POLYGONS, SIDE, coco_document, image_entry, packed_runs, write_coco
from parts.images import draw_image, png, write_files
from parts.paths import REPO

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
COCO98 = REPO.parent / "shared" / "data" / "coco98"


def by_pycocotools(path: Path, step: int) -> dict[str, dict[str, np.ndarray]]:
    """Of every `step`-th image: boxes, classes by name, masks, areas and crowds, in the order of the file."""
    from pycocotools.coco import COCO

    coco = COCO(str(path))
    images = {}
    for image in list(coco.imgs.values())[::step]:
        entries = coco.loadAnns(coco.getAnnIds(image["id"]))
        masks = [coco.annToMask(entry) for entry in entries]
        boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
        images[image["file_name"]] = {
            "boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
            "classes": np.array([coco.cats[entry["category_id"]]["name"] for entry in entries]),
            "masks": np.array(masks, dtype=bool).reshape(len(entries), image["height"], image["width"]),
            "areas": np.array([entry["area"] for entry in entries], dtype=np.float64),
            "crowd": np.array([entry["iscrowd"] for entry in entries], dtype=bool),
        }
    return images


def check_against_pycocotools(root: Path, file: str, step: int = 1) -> int:
    """Compare every `step`-th image; the number of objects."""
    source = open_layout(f"coco-json:{root}@{file}")
    assert source is not None and source.kind is Instances
    truth = by_pycocotools(root / file, step)
    num = 0
    rows = {item.key.rpartition("/")[2]: row for row, item in enumerate(source.items)}
    for name, own in truth.items():
        row = rows[name]
        objects = source.target(row, own["masks"].shape[1:])
        assert isinstance(objects, Instances) and objects.masks is not None
        assert_array_equal(objects.masks, own["masks"])
        assert_array_equal(objects.boxes, own["boxes"])
        assert_array_equal(np.array(source.classes.names)[objects.classes], own["classes"])
        assert_array_equal(objects.areas, own["areas"])
        assert_array_equal(objects.crowd, own["crowd"])
        num += len(objects)
    return num


def test_objects_of_every_form_are_those_of_pycocotools(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_document())
    assert check_against_pycocotools(root, "labels.json") == 3
    source = open_layout(f"coco-json:{root}@labels.json")
    assert [item.key for item in source.items] == ["a.png", "b.png"]
    assert source.classes.names == ("cat", "bird", "dog")
    assert source.classes.numbers == {0: 3, 1: 7, 2: 90}
    empty = source.target(0, (SIDE, SIDE))
    assert len(empty) == 0 and empty.masks.shape == (0, SIDE, SIDE) and empty.boxes.shape == (0, 4)
    assert source.notes() == ()


def test_objects_of_real_photographs_are_those_of_pycocotools() -> None:
    if not COCO98.is_dir():
        pytest.skip(f"no photographs at {COCO98}")
    assert check_against_pycocotools(COCO98, "annotations/instances_train2017.json", step=6) > 100


def test_random_polygons_are_rasterised_as_by_pycocotools(tmp_path: Path) -> None:
    """Points on and beyond the image's edges, and lines that cross."""
    rng = np.random.default_rng(0)
    annotations = [
        {
            "id": idx,
            "image_id": 10,
            "category_id": 3,
            "iscrowd": 0,
            "area": 1.5,
            "bbox": [0, 0, 5, 5],
            "segmentation": [rng.uniform(-4, SIDE + 4, 2 * rng.integers(3, 9)).round(2).tolist()],
        }
        for idx in range(60)
    ]
    assert check_against_pycocotools(write_coco(tmp_path, coco_document(annotations=annotations)), "labels.json") == 60


def test_packed_masks_come_back_as_they_were(tmp_path: Path) -> None:
    mask = np.random.default_rng(1).random((SIDE, SIDE)) > 0.5
    annotation = {"id": 1, "image_id": 10, "category_id": 3, "segmentation": packed_runs(mask)}
    root = write_coco(tmp_path, coco_document(annotations=[annotation]))
    objects = open_layout(f"coco-json:{root}@labels.json").target(1, (SIDE, SIDE))
    assert_array_equal(objects.masks[0], mask)
    rows, columns = np.nonzero(mask)  # without a box or an area in the file they are those of the mask
    assert objects.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert objects.areas.tolist() == [mask.sum()]


def test_boxes_alone_have_no_masks_and_areas_of_their_own(tmp_path: Path) -> None:
    annotation = {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 3.5, 4], "segmentation": []}
    root = write_coco(tmp_path, coco_document(annotations=[annotation]))
    objects = open_layout(f"coco-json:{root}@labels.json").target(1, (SIDE, SIDE))
    assert objects.masks is None
    assert objects.areas.tolist() == [14.0]
    assert objects.boxes.tolist() == [[1, 2, 4.5, 6]]


def test_images_are_found_by_the_end_of_their_path_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    document = coco_document(images=[image_entry(10, "b.png"), image_entry(9, "gone.png"), image_entry(8, "x/a.png")])
    document["annotations"] += [
        {"id": 7, "image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"id": 8, "image_id": 10, "category_id": 3, "bbox": [4, 4, 0, 1], "segmentation": POLYGONS},
    ]
    root = write_coco(tmp_path, document, ("photos/b.png", "photos/x/a.png", "photos/y/a.png"))
    source = open_layout(f"coco-json:{root}@labels.json")
    assert [item.key for item in source.items] == ["photos/b.png", "photos/x/a.png"]
    file = f"{root}/labels.json"
    assert list(source.notes()) == [
        f"{file}: left out 1 annotation of images that the file does not list, image_id 77 for one",
        f"{file}: left out 1 annotation whose box has no area, annotation 8 for one",
        f"left out 1 image that {file} lists and {root} does not hold: gone.png",
        f"left out 1 image that {file} does not list: photos/y/a.png",
    ]


def test_a_copy_made_by_pickling_reads_the_same(tmp_path: Path) -> None:
    source = open_layout(f"coco-json:{write_coco(tmp_path, coco_document())}@labels.json")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1) == source.read(1)
    assert_array_equal(copy.target(1, (SIDE, SIDE)).masks, source.target(1, (SIDE, SIDE)).masks)


def annotation(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the first annotation; None takes a field away."""

    def change(document: dict[str, Any]) -> None:
        document["annotations"][0].update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (annotation(category_id=4), "annotation 1 is of category 4, which the file does not list"),
        (annotation(category_id=None), "annotation 1 has no category_id"),
        (annotation(id=2), "annotation 2 occurs twice"),
        (annotation(image_id=[10]), r"annotation 1 has image_id \[10\], which is neither number nor text"),
        (annotation(bbox=[1, 2, "3", 4]), r"annotation 1 has bbox \[1, 2, '3', 4\]"),
        (annotation(bbox=[1, 2, float("nan"), 4]), "annotation 1 has bbox"),
        (annotation(bbox=[1, 2, 10**200, 10**200]), "annotation 1 has bbox"),  # whose product is no float
        (annotation(area=10**400), "annotation 1 has bbox .* and area 1000"),
        (annotation(bbox=7), "annotation 1 has bbox 7"),
        (annotation(area="large"), "annotation 1 has bbox .* and area large"),
        (annotation(bbox=None, segmentation=None), "annotation 1 has neither bbox nor segmentation"),
        (annotation(segmentation=None), "image_id 10 has an object with a box and no segmentation, and others have"),
        (annotation(segmentation=[[1, 2, 3, 4]]), "annotation 1 has a polygon of 4 numbers"),
        (annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 1 has a polygon of 7 numbers"),
        (annotation(segmentation="polygon"), "annotation 1 has a segmentation that is neither"),
        (annotation(segments_info=[]), "annotation 1 has segments_info: these are panoptic labels"),
        (lambda document: document["images"].append(image_entry(10, "c.png")), "id 10 occurs twice among images"),
        (lambda document: document["images"].append(image_entry(4, "a.png")), "the image a.png is listed twice"),
        (lambda document: document["images"][0].pop("file_name"), "image 10 has no file_name"),
        (lambda document: document["images"][0].update(height="24"), r"b.png has height and width \('24', 24\)"),
        (lambda document: document["categories"].append({"id": 4, "name": "cat"}), "cat is the name of two categories"),
        (lambda document: document["categories"].append(CATEGORIES[0]), "id 3 occurs twice among categories"),
        (lambda document: document.pop("categories"), "no list of categories, but annotations, images"),
        (lambda document: document["images"].clear(), "lists no image"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_when_it_is_opened(change: Callable[[Any], None], said: str) -> None:
    document = json.loads(json.dumps(coco_document()))
    change(document)
    with pytest.raises(InputError, match=f"^labels.json: .*{said}"):
        parse_coco(json.dumps(document).encode(), "labels.json")


def test_lists_may_stand_in_any_order() -> None:
    document = coco_document()
    document["annotations"][-1]["image_id"] = 77
    expected = parse_coco(json.dumps(document).encode(), "x")
    turned = parse_coco(json.dumps(dict(reversed(document.items()))).encode(), "x")
    assert list(turned.images.values()) == list(expected.images.values())
    assert (turned.has_masks, turned.notes, turned.classes) == (expected.has_masks, expected.notes, expected.classes)
    assert expected.notes == ("x: left out 1 annotation of images that the file does not list, image_id 77 for one",)


@pytest.mark.parametrize(("data", "said"), [(b"{", "is no JSON"), (b"[]", "holds a list, as files of results do")])
def test_what_is_no_file_of_annotations_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=f"labels.json: {said}"):
        parse_coco(data, "labels.json")


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [SIDE, SIDE], "counts": [5, 5]}, "run lengths of 10 pixels in an image of 576"),
        ({"size": [SIDE, SIDE], "counts": [5, -5, 576]}, "run lengths of 576 pixels"),
        ({"size": [4, 5], "counts": [5, 15]}, r"run lengths of \[5, 4\] px in an image of \[24, 24\]"),
        ({"size": [SIDE, SIDE], "counts": "f1b06000R>R>R>"}, "cannot be read"),
        ({"size": [SIDE, SIDE], "counts": "f1"}, "cannot be read"),
        ([[1, 2, 3, float("inf"), 5, 6]], "a point at inf px"),
        ([[1, 2, 3, float("nan"), 5, 6]], "a point at nan px"),
        ([[1, 2, 3e9, 4, 5, 6]], "a point at 3e.09 px, in an image of 24x24"),  # would take 100 GB
        ([[1, 2, 3, "x", 5, 6]], "could not convert"),
    ],
)
def test_what_cannot_be_rasterised_is_named_with_its_image(segmentation: Any, said: str, tmp_path: Path) -> None:
    document = json.loads(json.dumps(coco_document()))
    document["annotations"][0]["segmentation"] = segmentation
    source = open_layout(f"coco-json:{write_coco(tmp_path, document)}@labels.json")
    with pytest.raises(InputError, match=f"labels.json: image b.png has a segmentation .*{said}"):
        source.target(1, (SIDE, SIDE))


ODD = (
    *(
        None,
        True,
        -1,
        1e308,
        float("nan"),
        10**30,
        10**400,
        float("inf"),
        "",
        "x",
        [],
        [[]],
        {},
        [None] * 4,
        [[1e300] * 6],
        "\ud800",
    ),
    *({"size": [SIDE, SIDE], "counts": "f1"}, {"size": None, "counts": [1]}, {"size": [SIDE, SIDE], "counts": ["a"]}),
)


@pytest.mark.parametrize("seed", range(4))
def test_files_with_odd_values_anywhere_are_read_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    num_read = 0
    for _ in range(150):
        document = json.loads(json.dumps(coco_document()))
        places = list(places_in(document))
        for parent, key in rng.sample(places, 2):
            parent[key] = rng.choice(ODD)
        try:
            file = parse_coco(json.dumps(document).encode(), "labels.json")
            for image in file.images.values():
                num_read += isinstance(CocoTargets("", (image,), file.has_masks)(0, (SIDE, SIDE)), Instances)
        except InputError as err:
            assert ";" in str(err)  # what to do
    assert num_read


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each list or object inside a value, with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places_in(value[key])


def test_more_masks_than_memory_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_layout(f"coco-json:{write_coco(tmp_path, coco_document())}@labels.json")
    monkeypatch.setattr("dtpipe.extract.sources.layouts.objects.MAX_MASKS_BYTES", 2 * SIDE * SIDE)
    with pytest.raises(
        InputError, match=r"image b.png has 3 objects, whose masks take 1728 bytes at 24x24 px, over .* 1152; cut"
    ):
        source.target(1, (SIDE, SIDE))


def test_labels_of_another_size_or_place_than_their_image_are_refused(tmp_path: Path) -> None:
    document = json.loads(json.dumps(coco_document()))
    document["annotations"][0]["bbox"] = [30, 0, 4, 4]
    source = open_layout(f"coco-json:{write_coco(tmp_path, document)}@labels.json")
    with pytest.raises(InputError, match=r"image a.png is labelled at 24x24 px and has, turned .*, 32x24"):
        source.target(0, (24, 32))
    with pytest.raises(InputError, match=r"image b.png has an object at \[30, 0, 4, 4\], outside of its 24x24 px"):
        source.target(1, (SIDE, SIDE))


def test_a_file_whose_images_cannot_be_told_or_found_is_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "two", coco_document(), ("x/a.png", "y/a.png", "b.png"))
    with pytest.raises(InputError, match=r"image a.png may be x/a.png, y/a.png; name a root that holds one"):
        open_layout(f"coco-json:{root}@labels.json")
    root = write_coco(tmp_path / "none", coco_document(), ("c.png",))
    with pytest.raises(
        InputError, match=r"none of the 2 images that .*labels.json lists is there, a.png for one, but c"
    ):
        open_layout(f"coco-json:{root}@labels.json")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_not_named_or_not_there_is_answered_with_those_that_lie_there(
    packed: bool, tmp_path: Path
) -> None:
    root = write_coco(tmp_path / "data", coco_document())
    write_files(root, {"ann/train.json": b"{}", "ann/val.json": b"{}"})
    place = shutil.make_archive(str(root), "zip", root) if packed else str(root)
    every = f"as in coco-json:{place}@ann/train.json or @ann/val.json or @labels.json"
    wrong = {
        "": f"{place}: name the file with the labels after @, {every}",
        "@ann": f"ann is a folder; name the file with the labels after @, {every}",
        "@nowhere.json": f"there is no nowhere.json; name the file with the labels after @, {every}",
        "@val.json": f"there is no val.json; name the file .* as in coco-json:{place}@ann/val.json$",
    }
    for split, said in wrong.items():
        with pytest.raises(ConfigError, match=said):
            open_layout(f"coco-json:{place}{split}")
    bare = write_files(tmp_path / "bare", {"a.png": png(draw_image(0, SIDE))})
    with pytest.raises(ConfigError, match=r"there is no a.json; no JSON file lies there; name .* by its whole path"):
        open_layout(f"coco-json:{bare}@a.json")


def test_a_file_in_the_place_of_the_word_of_a_published_split_is_sent_to_the_layout_that_takes_it() -> None:
    with pytest.raises(
        ConfigError, match=r"a split is one word, such as val2017, .* read as coco-json:d@ann/train.json"
    ):
        open_layout("coco:d@ann/train.json")
