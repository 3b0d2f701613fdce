"""Objects from a JSON file in Scalabel's format, as BDD100K publishes them: polygons with curves, or run lengths.

    [{"name": "a.jpg", "labels": [{"category": "car", "attributes": {"crowd": false}, "poly2d": [..]}]}, ..]

of `{"frames": [..]}`. Later objects lie over earlier ones, as where the bitmasks are drawn from the same file.
Source: scalabel/scalabel, label/transforms.py; names and what is ignored: bdd100k/bdd100k, configs/ins_seg.toml.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.sources.layouts.files import Tree, few
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.objects import run_lengths
from dtpipe.extract.sources.layouts.published.pairs import left_over
from dtpipe.extract.sources.layouts.published.segments import instances_of_masks
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Instances
from dtpipe.manifests.words import count_of

_RENAMED = {"bike": "bicycle", "caravan": "car", "motor": "motorcycle", "person": "pedestrian", "van": "car"}
_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
_POINTS_OF_CURVE = 20  # straight pieces that stand for a curve
_Label = tuple[int, bool, Any]
"""Class number, whether it is a crowd or ignored, and polygons or run lengths as they stand in the file."""


def open_scalabel(tree: Tree, folder: str, file: str, classes: ClassTable) -> ListedSource:
    """The images of a folder that a file lists, with their objects. Raises: InputError."""
    where = f"{tree.root}: {file}"
    notes: Counter[str] = Counter()
    stated: dict[str, bytes] = {}
    try:
        for frame in _frames(tree.read_named(file), where):
            name = str(frame.get("name", "")).rpartition("/")[2]
            if not name or name in stated:
                raise InputError(f"{where}: a frame has no name of its own, {name!r}; fetch it again")
            labels = [_label(label, classes, f"{where}: {name}", notes) for label in frame.get("labels") or ()]
            stated[name] = json.dumps([label for label in labels if label is not None]).encode()
    except (TypeError, AttributeError) as err:
        raise InputError(f"{where}: a frame is not of Scalabel's form ({err}); fetch it again") from err
    images = {item.key: item for item in tree.images(folder).values()}
    there = sorted(images.keys() & stated.keys())
    if not there:
        raise InputError(f"{where} lists {few(sorted(stated)) or 'no image'}, and {folder} holds {few(sorted(images))}")
    said = left_over(sorted(images.keys() - stated.keys()), folder, sorted(stated.keys() - images.keys()), file)
    said += tuple(f"left out {count_of(num, 'label')} of {file}: {why}" for why, num in sorted(notes.items()))
    targets = _Objects(where, [(name, stated[name]) for name in there])
    return ListedSource(Instances, classes, [images[name] for name in there], tree, targets, said)


@dataclass(frozen=True, eq=False)
class _Objects:
    """Objects of an image, by row."""

    where: str
    labels: Sequence[tuple[str, bytes]]

    def __call__(self, row: int, image_px: tuple[int, int]) -> Instances:
        name, stated = self.labels[row]
        labels: list[_Label] = json.loads(stated)
        masks = np.zeros((len(labels), *image_px), dtype=bool)
        for idx, (_, _, shape) in enumerate(labels):
            try:
                masks[idx] = _rasterise(shape, image_px)
            except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError) as err:
                raise InputError(
                    f"{self.where}: {name} has a shape that cannot be read ({err}); fetch it again"
                ) from err
            masks[:idx, masks[idx]] = False
        return instances_of_masks(masks, [(number, unscored) for number, unscored, _ in labels])


def _frames(data: bytes, where: str) -> Sequence[Mapping[str, Any]]:
    try:
        document = json.loads(data)
        frames = document["frames"] if isinstance(document, dict) else document
    except (ValueError, RecursionError, KeyError) as err:
        raise InputError(f"{where}: is no file of Scalabel's frames ({err}); fetch it again") from err
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise InputError(f"{where}: holds no list of frames; fetch it again")
    return frames


def _label(label: Mapping[str, Any], classes: ClassTable, where: str, notes: Counter[str]) -> _Label | None:
    """None where it is of no class here or has no shape, which is counted. Raises: InputError for another form."""
    if not isinstance(label, Mapping) or "category" not in label:
        raise InputError(f"{where} has a label without a category; fetch it again")
    category, attributes = label["category"], label.get("attributes") or {}
    name = _IGNORED.get(category) or _RENAMED.get(category, category)
    shape = label.get("rle") or label.get("poly2d")
    if name not in classes.names:
        notes[f"{category} is no class of this task"] += 1
        return None
    if not shape:
        notes["it has neither polygons nor run lengths"] += 1
        return None
    unscored = category in _IGNORED or any(attributes.get(name) for name in ("crowd", "ignored", "ignore"))
    return classes.names.index(name), bool(unscored), shape


# --- shapes ----------------------------------------------------------------------------------------------------------


def _rasterise(shape: Any, image_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Shapes: -> (H, W). Raises: ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError."""
    from faster_coco_eval.core import mask as coco_mask

    if not isinstance(shape, dict):
        shape = [flatten(polygon["vertices"], polygon["types"]).ravel().tolist() for polygon in shape]
    decoded: NDArray[np.bool_] = coco_mask.decode(run_lengths(shape, image_px)).astype(bool)
    return decoded


def flatten(vertices: Sequence[Sequence[float]], types: str) -> NDArray[np.float64]:
    """The corners of a closed outline whose curves are made of straight pieces. Shapes: -> (n, 2).

    `types` has a letter for each vertex: L for a corner, C where a cubic Bezier curve begins: this vertex and the next
    are its control points and the one after them its end, whatever their letters; the outline ends in its first vertex.

    Raises: ValueError for other letters, another number of them, or fewer than three vertices.
    """
    if len(vertices) != len(types) or set(types) - set("LC") or len(types) < 3:
        raise ValueError(f"{len(vertices)} vertices of types {types[:20]!r}")
    points = np.asarray([*vertices, vertices[0]], dtype=np.float64)[:, :2]
    if not np.isfinite(points).all():
        raise ValueError("a vertex that is no number")
    outline, at = [points[:1]], 1
    while at < len(types):
        if types[at] == "L":
            outline.append(points[at : at + 1])
            at += 1
            continue
        if at + 2 >= len(points):
            raise ValueError("a curve without its end")
        outline.append(_curve(points[at - 1 : at + 3]))
        at += 3
    return np.concatenate(outline)


def _curve(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A cubic Bezier curve from the first to the last of four points, without the first. Shapes: (4, 2) -> (n, 2)."""
    t = np.linspace(0, 1, _POINTS_OF_CURVE + 1)[1:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return weights @ points
