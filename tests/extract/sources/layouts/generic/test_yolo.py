"""YOLO's labels: boxes and polygons in px by hand and by pycocotools; what is wrong with a line is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Instances
from parts.images import png, write_files
from parts.packing import folder_files, write_zip

PX = (20, 40)
YAML = "train: images/train\nnames:\n  0: cat\n  1: dog\n"


def tree(root: Path, labels: dict[str, str], yaml: str = YAML, images: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    """Images of the split `train`, 40 x 20 px, with files of labels and the file of names."""
    picture = png(np.zeros((*PX, 3), np.uint8))
    files = {f"images/train/{name}": picture for name in images}
    files |= {f"labels/train/{name}": text.encode() for name, text in labels.items()}
    return write_files(root, {**files, "data.yaml": yaml.encode()} if yaml else files)


def opened(root: Path, labels: dict[str, str], yaml: str = YAML) -> ListedSource:
    return open_layout(f"yolo:{tree(root, labels, yaml)}@train")


def test_boxes_are_shares_of_the_sides_around_their_centre(tmp_path: Path) -> None:
    source = opened(tmp_path, {"a.txt": "1 0.5 0.5 0.25 0.5\n0 0.125 0.1 0.05 0.1\n", "b.txt": ""})
    assert source.kind is Instances and source.classes.names == ("cat", "dog")
    objects = source.target(0, PX)
    assert_allclose(objects.boxes, [[15, 5, 25, 15], [4, 1, 6, 3]], atol=1e-9)  # rounding of shares
    assert objects.classes.tolist() == [1, 0] and objects.masks is None
    assert_allclose(objects.areas, [100, 4])
    assert len(source.target(1, PX)) == 0
    assert source.notes() == []


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
def test_polygons_are_rasterised_as_by_pycocotools_in_boxes_of_their_points(tmp_path: Path) -> None:
    from pycocotools import mask as coco_mask

    shares = np.random.default_rng(0).random((5, 7, 2)).round(4)
    lines = [f"{idx % 2} {' '.join(map(str, points.ravel()))}" for idx, points in enumerate(shares)]
    objects = opened(tmp_path, {"a.txt": "\n".join(lines)}).target(0, PX)
    points = shares * [PX[1], PX[0]]
    for idx in range(5):
        truth = coco_mask.decode(coco_mask.frPyObjects([points[idx].ravel().tolist()], *PX))[..., 0]
        assert_array_equal(objects.masks[idx], truth)
        assert objects.areas[idx] == truth.sum()
    assert_allclose(objects.boxes, np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1))
    assert objects.classes.tolist() == [0, 1, 0, 1, 0]


def test_folders_of_splits_may_hold_images_and_labels_and_a_zip_does(tmp_path: Path) -> None:
    """As Roboflow exports them."""
    files = folder_files(tree(tmp_path / "a", {"a.txt": "0 0.5 0.5 0.5 0.5", "b.txt": "1 0.5 0.5 0.5 0.5"}))
    moved = {
        name.replace("images/train", "train/images").replace("labels/train", "train/labels"): data
        for name, data in files.items()
    }
    archive = write_zip(tmp_path / "a.zip", moved)
    source = pickle.loads(pickle.dumps(open_layout(f"yolo:{archive}@train")))
    assert [source.target(row, PX).classes.tolist() for row in range(2)] == [[0], [1]]
    assert source.read(0) == files["images/train/a.png"]


def test_what_is_left_out_or_empty_is_said(tmp_path: Path) -> None:
    labels = {"a.txt": "0 .5 .5 .5 .5\n0 .5 .5 .5 .5\n1 .5 .5 0 .5\n\n", "c.txt": "0 .5 .5 .5 .5"}
    source = opened(tmp_path, labels)
    assert len(source.target(0, PX)) == 1
    assert list(source.notes()) == [
        "left out 1 file of labels/train without an image: c.txt",
        "1 image without a file in labels/train has no objects: b.txt",
        "left out 1 line of labels/train that repeat others, in a.txt",
        "left out 1 line of labels/train whose box has no area, in a.txt",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2 .5 .5 .5 .5", "a.txt: line 1 is of class 2, and the classes are 0 to 1"),
        ("0.5 .5 .5 .5 .5", "line 1 is of class 0.5"),
        ("\n0 .5 .5 .5", "line 2 has 3 numbers behind the class; a box has 4, a polygon 6 or more, in pairs"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "line 1 has 7 numbers"),
        ("0 .5 .5 .5 .5 .9", "line 1 has 5 numbers"),
        ("cat .5 .5 .5 .5", "line 1 is no class and shares"),
        ("0 12 5 4 4", "line 1 holds 12; positions are shares of the image's sides"),
        ("0 nan .5 .5 .5", "line 1 holds nan"),
        ("0 .5 .5 .5 .5\n1 .1 .1 .2 .2 .3 .1", "labels/train/a.txt has polygons and labels/train/a.txt boxes"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        opened(tmp_path, {"a.txt": text, "b.txt": ""})


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("", r"there is no data.yaml; it holds images, labels"),
        ("nc: 2\n", "data.yaml: has no `names`"),
        ("nc: 3\nnames: [cat, dog]\n", "says nc: 3 and names 2 classes"),
        ("names: [cat, cat]\n", "a class name occurs twice among cat, cat"),
        ("names: {0: cat, 2: dog}\n", "their numbers are not 0, 1, 2"),
        ("names: {null: cat}\n", r"data.yaml: .*None stands where a class's number does\); list them"),
        ("names: {0: cat, 2024-01-31: dog}\n", r"datetime.date\(2024, 1, 31\) stands where"),
        ("names: {0: cat, .inf: dog}\n", "inf stands where"),
        ("names: {0: cat, .nan: dog}\n", "nan stands where"),
        ("names: {0: cat, 1.5: dog}\n", "1.5 stands where"),
        ("names: {0: cat, true: dog}\n", "True stands where"),
        ("names: {0: yes, 1: no}\n", "one of them is read as True, which is no text; put it in quotes"),
        ("names: [cat, null]\n", "one of them is read as None"),
        ("names: [cat, dog]\nkpt_shape: [17, 3]\n", "these are labels of keypoints"),
        ("names: [cat", "not valid YAML"),
    ],
)
def test_names_that_cannot_be_read_are_refused(yaml: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        opened(tmp_path, {"a.txt": ""}, yaml)


def test_names_may_stand_in_a_list_or_in_lines_of_text(tmp_path: Path) -> None:
    assert opened(tmp_path / "list", {"a.txt": ""}, "names: [cat, dog]\nnc: 2\n").classes.names == ("cat", "dog")
    root = tree(tmp_path / "text", {"a.txt": ""}, "")
    write_files(root, {"classes.txt": b"cat\ndog\n"})
    assert open_layout(f"yolo:{root}@train").classes.names == ("cat", "dog")


def test_splits_and_images_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a.txt": ""}, images=("a.png", "a.jpg"))
    with pytest.raises(InputError, match=r"a.jpg and a.png have one file of labels, a.txt; leave one of them"):
        open_layout(f"yolo:{root}@train")
    write_files(root, {"images/val/a.png": b""})
    with pytest.raises(ConfigError, match=r"is divided into train and val; write yolo:.*@train"):
        open_layout(f"yolo:{root}")
    with pytest.raises(InputError, match=r"there is no images/test; it holds train, val in images"):
        open_layout(f"yolo:{root}@test")
