"""BDD100K's objects from JSON: curves as matplotlib draws them, run lengths as pycocotools packs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.published.scalabel import flatten
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Instances
from parts import published_trees as trees
from parts.coco import packed_runs
from parts.images import write_files
from parts.published_trees import DOWN, HEIGHT, LEFT, WIDTH, painted, scalabel_label, square

PX = (HEIGHT, WIDTH)
NAME = "labels/ins_seg/polygons/ins_seg_train.json"
CURVED = [[1, 1], [6, 0], [9, 3], [11, 7], [3, 7], [0, 6]]  # the curve after the second corner ends in an L, or in a C
OPEN_ENDED = [[1, 1], [11, 1], [11, 7], [6, 9], [0, 8]]  # the last curve ends in the first corner


def opened(root: Path) -> LabelledSource:
    labelled = open_layout(f"bdd100k-ins:{root}@train")
    assert labelled is not None and labelled.kind is Instances
    return labelled


def objects(labelled: LabelledSource, row: int = 0) -> Instances:
    target = labelled.target(row, PX)
    assert isinstance(target, Instances)
    return target


def drawn_by_matplotlib(vertices: Any, types: str) -> np.ndarray:
    """An outline by the codes that Scalabel's own tools give to matplotlib. Shapes: -> (n, 2)."""
    from matplotlib.path import Path as Outline

    codes = [{"L": Outline.LINETO, "C": Outline.CURVE4}[letter] for letter in types]
    codes = [Outline.MOVETO, *codes[1:], Outline.LINETO]
    (polygon,) = Outline([*vertices, vertices[0]], codes).to_polygons()
    return np.asarray(polygon)


def to_outline(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Distance in px of each point to the closed outline."""
    starts, ends = outline, np.roll(outline, -1, axis=0)
    along = ends - starts
    squares = np.maximum((along**2).sum(axis=1), 1e-12)
    share = np.clip(((points[:, None] - starts) * along).sum(axis=2) / squares, 0, 1)
    return np.linalg.norm(points[:, None] - (starts + share[..., None] * along), axis=2).min(axis=1)


@pytest.mark.parametrize(
    ("vertices", "types"),
    [(CURVED, "LLCCLL"), (CURVED, "LLCCCL"), (CURVED, "LLLLLL"), (OPEN_ENDED, "LLLCC"), (CURVED, "CLCCLL")],
)
def test_outlines_are_those_that_matplotlib_draws(vertices: list[list[float]], types: str) -> None:
    """Within 0.1 px both ways: each breaks curves into straight pieces of its own."""
    ours, theirs = flatten(vertices, types), drawn_by_matplotlib(vertices, types)
    assert to_outline(ours, theirs).max() < 0.1 and to_outline(theirs, ours).max() < 0.1
    assert len(ours) == len(vertices) or "CC" in types


def filled_by_matplotlib(vertices: Any, types: str, height: int, width: int) -> np.ndarray:
    """The pixels inside an outline as the tools that draw bitmasks fill it. Shapes: -> (height, width) bool."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Polygon

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.add_patch(Polygon(drawn_by_matplotlib(vertices, types), facecolor="white", lw=0, antialiased=False))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0] > 127


def test_filled_outlines_are_those_of_bitmasks_but_for_their_border(tmp_path: Path) -> None:
    """Two fillings of one shape may differ in pixels that its outline cuts."""
    vertices, px = (np.asarray(CURVED) * 12).tolist(), (HEIGHT * 12, WIDTH * 12)
    labels = [scalabel_label("car", [{"vertices": vertices, "types": "LLCCLL", "closed": True}])]
    target = opened(write_files(tmp_path, trees.bdd100k_json(labels))).target(0, px)
    assert isinstance(target, Instances) and target.masks is not None
    theirs = filled_by_matplotlib(vertices, "LLCCLL", *px)
    different = np.argwhere(target.masks[0] != theirs)[:, ::-1] + 0.5
    assert theirs.sum() > 5000
    assert to_outline(different, drawn_by_matplotlib(vertices, "LLCCLL")).max() < 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_polygons_are_objects_and_later_ones_lie_on_top(tmp_path: Path, wrapped: bool) -> None:
    labels = [
        scalabel_label("bike", square(0, 0, 8, 6)),
        scalabel_label("person", square(4, 2, 12, 8) + square(0, 7, 2, 8), crowd=True),
        scalabel_label("other vehicle", square(10, 0, 12, 1), occluded=True),
        scalabel_label("van", square(9, 0, 10, 1), truncated=True),
        scalabel_label("lane/crosswalk", square(0, 0, 3, 3)),
        scalabel_label("car", None),
    ]
    labelled = opened(write_files(tmp_path, trees.bdd100k_json(labels, wrapped=wrapped)))
    read = objects(labelled)
    assert [labelled.classes.names[number] for number in read.classes] == ["bicycle", "pedestrian", "car", "car"]
    assert read.crowd is not None and read.crowd.tolist() == [False, True, True, False]
    expected = painted((slice(0, 6), slice(0, 8), 1), (slice(2, 8), slice(4, 12), 2), (slice(7, 8), slice(0, 2), 2),
                       (slice(0, 1), slice(10, 12), 3), (slice(0, 1), slice(9, 10), 4))  # fmt: skip
    assert read.masks is not None and read.areas is not None
    for number, mask in enumerate(read.masks, start=1):
        np.testing.assert_array_equal(mask, expected == number)
    assert read.boxes[1].tolist() == [0, 2, 12, 8] and read.areas[0] == 48 - 16
    assert len(objects(labelled, 1)) == 0  # labels: null
    assert labelled.notes() == (
        f"left out 1 image of images/10k/train without a label in {NAME}: lonely.jpg",
        f"left out 1 label of {NAME} without an image in images/10k/train: gone.jpg",
        f"left out 1 label of {NAME}: it has neither polygons nor run lengths",
        f"left out 1 label of {NAME}: lane/crosswalk is no class of this task",
    )


def test_a_hidden_object_is_none(tmp_path: Path) -> None:
    labels = [scalabel_label("car", square(1, 1, 3, 3)), scalabel_label("bus", square(0, 0, 12, 8))]
    read = objects(opened(write_files(tmp_path, trees.bdd100k_json(labels))))
    assert read.classes.tolist() == [4]


def test_run_lengths_are_objects(tmp_path: Path) -> None:
    mask = painted((DOWN, LEFT, 1)).astype(bool)
    files = trees.bdd100k_json([scalabel_label("train", packed_runs(mask), key="rle")], "rles")
    read = objects(opened(write_files(tmp_path, files)))
    assert read.masks is not None
    np.testing.assert_array_equal(read.masks[0], mask)
    assert read.classes.tolist() == [5]


def test_bitmasks_go_before_run_lengths_and_those_before_polygons(tmp_path: Path) -> None:
    polygons = trees.bdd100k_json([scalabel_label("bus", square(0, 0, 4, 4))])
    mask = painted((DOWN, LEFT, 1)).astype(bool)
    rles = trees.bdd100k_json([scalabel_label("train", packed_runs(mask), key="rle")], "rles")
    root = write_files(tmp_path, {**polygons, **rles})
    assert objects(opened(root)).classes.tolist() == [5]
    write_files(root, trees.bdd100k_ins())
    assert len(objects(opened(root))) == 5


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([{"vertices": [[0, 0], [1, 1]], "types": "LL"}], "2 vertices of types 'LL'"),
        ([{"vertices": [[0, 0], [1, 1], [2, 0]], "types": "LLX"}], "3 vertices of types 'LLX'"),
        ([{"vertices": [[0, 0], [1, 1], [2, 0]], "types": "LL"}], "3 vertices of types 'LL'"),
        ([{"vertices": [[0, 0], [1, 1], [2, 0]], "types": "LLC"}], "a curve without its end"),
        ([{"vertices": [[0, 0], [1, 1], [2, None]], "types": "LLL"}], "cannot be read"),
        ([{"types": "LLL"}], "vertices"),
        ({"size": [HEIGHT, WIDTH + 1], "counts": "0"}, "cannot be read"),
    ],
)
def test_a_shape_that_cannot_be_drawn_is_refused(tmp_path: Path, shape: Any, message: str) -> None:
    key = "rle" if isinstance(shape, dict) else "poly2d"
    labelled = opened(write_files(tmp_path, trees.bdd100k_json([scalabel_label("car", shape, key)])))
    with pytest.raises(InputError, match=f"a.jpg has a shape that cannot be read .*{message}|{message}"):
        objects(labelled)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is no file of Scalabel's frames"),
        (b'{"images": []}', "is no file of Scalabel's frames"),
        (b"[1]", "holds no list of frames"),
        (b'[{"name": "a.jpg"}, {"name": "x/a.jpg"}]', "a frame has no name of its own, 'a.jpg'"),
        (b'[{"labels": []}]', "a frame has no name of its own, ''"),
        (b'[{"name": "a.jpg", "labels": [{}]}]', "a.jpg has a label without a category"),
        (b'[{"name": "a.jpg", "labels": 5}]', "a frame is not of Scalabel's form"),
        (b'[{"name": "a.jpg", "labels": [{"category": []}]}]', "a frame is not of Scalabel's form"),
        (
            b'[{"name": "a.jpg", "labels": [{"category": "car", "attributes": 1, "rle": 1}]}]',
            "is not of Scalabel's form",
        ),
        (b'[{"name": "a.jpg", "labels": ["car"]}]', "a.jpg has a label without a category"),
        (b'[{"name": "z.jpg"}]', "lists z.jpg, and images/10k/train holds a.jpg, b.jpg, lonely.jpg"),
    ],
)
def test_json_that_is_not_as_published_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(write_files(tmp_path, {**trees.bdd100k_json([]), NAME: data}))
