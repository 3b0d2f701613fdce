"""COCO as it is published: objects of 80 classes, or things and stuff of 133 as segments.

    ROOT/annotations/instances_val2017.json      val2017/000000000139.jpg
         annotations/panoptic_val2017.json       annotations/panoptic_val2017/000000000139.png

A class's number is its place among the sorted ids of the file, which have gaps; `ClassTable.numbers` has the ids. A
pixel of a panoptic PNG holds a segment's id as R + 256 G + 65536 B, 0 where nothing is labelled.
Format: cocodataset.org, "Data format"; cocodataset/panopticapi.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.coco_json import field_of, number_categories, open_coco, parse_coco
from dtpipe.extract.sources.layouts.files import Tree, few
from dtpipe.extract.sources.layouts.json_stream import read_entries
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import left_over
from dtpipe.extract.sources.layouts.published.pixels import read_label, read_png
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import ClassTable, Instances, Panoptic
from dtpipe.manifests.words import count_of

_SPLITS = ("train2017", "val2017")


def _check_split(name: str, root: str, split: str | None) -> str:
    """Any split, since files are named by it: other years, and a user's own parts."""
    if split is None and root.endswith(".json"):
        raise ConfigError(
            f"{name}:{root}: a split is one word, such as {_SPLITS[1]}, for the files that are named by it; a file of "
            f"another name is read as coco-json:{root}"
        )
    if split is None:
        raise ConfigError(f"{name}:{root}: no split is named; write {name}:{root}@{' or @'.join(_SPLITS)}")
    return split


def _open_instances(root: str, split: str | None) -> LabelledSource:
    split = _check_split("coco", root, split)
    tree = Tree(root)
    name = f"annotations/instances_{split}.json"
    return open_coco(tree, tree.images(split), parse_coco(tree.read_named(name), f"{tree.root}: {name}"))


# --- panoptic --------------------------------------------------------------------------------------------------------


def _open_panoptic(root: str, split: str | None) -> LabelledSource:
    split = _check_split("coco-panoptic", root, split)
    tree = Tree(root)
    name = f"annotations/panoptic_{split}.json"
    document = _document(tree.read_named(name), f"{tree.root}: {name}")
    table, numbers = _classes(document["categories"], f"{tree.root}: {name}")
    folder = f"annotations/panoptic_{split}"
    return _join(tree, split, folder, _segments(document, numbers, f"{tree.root}: {name}"), table)


@dataclass(frozen=True)
class _Segments:
    """What the file says of one image."""

    png: str
    segments: bytes
    """JSON of (id, class number, crowd) of each; of many images they are smaller as text."""


@dataclass(frozen=True, eq=False)
class _PanopticLabels:
    """Segments of an image, by row. Those of the file that no pixel shows are passed over."""

    tree: Tree
    labels: Sequence[tuple[str, str, bytes]]
    """Name of the PNG below the root, its URI, and its segments."""

    def __call__(self, row: int, image_px: tuple[int, int]) -> Panoptic:
        name, uri, stated = self.labels[row]
        where = f"{self.tree.root}: {name}"
        channels = read_png(read_label(self.tree, uri, where), where, image_px, 3).astype(np.int32)
        segments = channels @ np.array([1, 256, 65536], np.int32)
        known = {own: (number, crowd) for own, number, crowd in json.loads(stated)}
        shown = set(np.unique(segments).tolist()) - {0}
        if odd := sorted(shown - known.keys()):
            raise InputError(
                f"{where} shows {count_of(len(odd), 'segment')} that the JSON file does not list, {odd[0]} for one; "
                "both must be of one release"
            )
        classes = {own: known[own][0] for own in sorted(shown)}
        return Panoptic(segments, classes, frozenset(own for own in shown if known[own][1]))


def _join(tree: Tree, split: str, folder: str, stated: Mapping[str, _Segments], table: ClassTable) -> ListedSource:
    """Images with their PNG and segments. Raises: InputError when none is whole."""
    images = {item.key: item for item in tree.images(split).values()}
    files = {name[len(folder) + 1 :]: uri for name, uri in tree.files(folder).items()}
    whole = sorted(name for name, own in stated.items() if name in images and own.png in files)
    if not whole:
        raise InputError(
            f"{tree.root}: none of the {count_of(len(stated), 'image')} that the JSON file lists is there with its "
            f"PNG; {split} holds {few(sorted(images)) or 'no image'}, {folder} {few(sorted(files)) or 'nothing'}"
        )
    missing = sorted(stated.keys() - set(whole))
    notes = left_over(sorted(images.keys() - stated.keys()), split, [], folder)
    if missing:
        notes += (f"left out {count_of(len(missing), 'image')} listed without image or PNG: {few(missing)}",)
    items: list[SourceItem] = [images[name] for name in whole]
    rows = [(f"{folder}/{stated[name].png}", files[stated[name].png], stated[name].segments) for name in whole]
    return ListedSource(Panoptic, table, items, tree, _PanopticLabels(tree, rows), notes)


def _document(data: bytes, where: str) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The entries of its lists; segments as JSON, which takes less room."""
    document: dict[str, list[Mapping[str, Any]]] = {part: [] for part in ("images", "annotations", "categories")}

    def take(part: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            raise TypeError(f"{entry!r} stands among its {part}")
        if "segments_info" in entry:
            entry = {**entry, "segments_info": json.dumps(entry["segments_info"])}
        document[part].append(entry)

    try:
        names = read_entries(data, document.keys(), take)
        for part in document:
            if not names[part]:
                raise TypeError(f"{part} is no list")
    except (ValueError, RecursionError, KeyError, TypeError) as err:
        raise InputError(f"{where}: is no file of panoptic annotations ({err}); fetch it again") from err
    if not document["images"]:
        raise InputError(f"{where}: lists no image; fetch it again")
    return document


def _classes(categories: Sequence[Mapping[str, Any]], where: str) -> tuple[ClassTable, Mapping[int, int]]:
    """The table with its things, and the class number of each id."""
    table, numbers = number_categories(categories, where)
    named = {own["id"]: field_of(own, "isthing", f"{where}: category {own['id']}") for own in categories}
    return replace(table, things=frozenset(numbers[own] for own, is_thing in named.items() if is_thing)), numbers


def _segments(
    document: Mapping[str, Sequence[Mapping[str, Any]]], numbers: Mapping[int, int], where: str
) -> Mapping[str, _Segments]:
    """What the file says, by the image's file name. Raises: InputError naming an entry that is not as published."""
    try:
        names = {image["id"]: str(image["file_name"]) for image in document["images"]}
        if len(set(names.values())) < len(document["images"]):
            raise InputError(f"{where}: lists an image or an id twice; fetch it again")
        stated: dict[str, _Segments] = {}
        for annotation in document["annotations"]:
            name = names[annotation["image_id"]]
            if name in stated:
                raise InputError(f"{where}: annotates {name} twice; leave one of them")
            rows = [
                _segment(segment, numbers, f"{where}: {name}") for segment in json.loads(annotation["segments_info"])
            ]
            stated[name] = _Segments(str(annotation["file_name"]), json.dumps(rows).encode())
    except (KeyError, TypeError, ValueError) as err:
        raise InputError(
            f"{where}: an entry is not as published, or of an image that is not listed: {_flaw(err)}; fetch it again"
        ) from err
    if not stated:
        raise InputError(f"{where}: there are no annotations in it; fetch it again")
    return stated


def _segment(segment: Mapping[str, Any], numbers: Mapping[int, int], where: str) -> tuple[int, int, bool]:
    if segment["category_id"] not in numbers:
        raise InputError(
            f"{where}: segment {segment['id']} is of category {segment['category_id']}, which the file does not list"
        )
    if isinstance(segment["id"], float) and not segment["id"].is_integer():
        raise ValueError(f"segment id {segment['id']} is no whole number")
    return int(segment["id"]), numbers[segment["category_id"]], bool(segment.get("iscrowd", 0))


def _flaw(err: Exception) -> str:
    return f"{err} is not there" if isinstance(err, KeyError) else str(err)


LAYOUTS = (
    Layout(
        name="coco",
        reads="COCO's objects: annotations/instances_SPLIT.json and the images in SPLIT; crowds, ids with gaps.",
        kind=Instances,
        open=_open_instances,
        splits=_SPLITS,
    ),
    Layout(
        name="coco-panoptic",
        reads="COCO's things and stuff: annotations/panoptic_SPLIT.json, its PNG folder, and the images in SPLIT.",
        kind=Panoptic,
        open=_open_panoptic,
        splits=_SPLITS,
    ),
)
