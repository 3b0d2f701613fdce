"""Cityscapes with fine annotations: 19 classes of pixels, objects of eight of them, or both as segments.

    ROOT/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
         gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png      numbers 0..33
                             aachen_000000_000019_gtFine_instanceIds.png   the same, or 1000 x number + object

Source: mcordts/cityscapesScripts, helpers/labels.py and preparation/createPanopticImgs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import check_split, pair_up
from dtpipe.extract.sources.layouts.published.pixels import PngLabels, Values, renumbered
from dtpipe.extract.sources.layouts.published.segments import instances_of
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import IGNORE_VALUE, ClassTable, Instances, Mask, Panoptic, Target

_SPLITS = ("train", "val")
_NUM_IDS = 34  # of labels.py that occur in files; license plates, -1, are not drawn
_OBJECTS_FROM = 1000
_IMAGE = "_leftImg8bit.png"


def _open(
    name: str, kind: type[Target], ending: str, read: Callable[[Values, str], Target], root: str, split: str | None
) -> LabelledSource:
    split = check_split(name, root, split, _SPLITS)
    tree = Tree(root)
    pairs = pair_up(tree, f"leftImg8bit/{split}", f"gtFine/{split}", f"_gtFine_{ending}.png", _IMAGE)
    targets = PngLabels(tree, tree.root, pairs.labels, 1, read)
    table = _things() if kind is Instances else published_classes("cityscapes")
    return ListedSource(kind, table, pairs.items, tree, targets, pairs.notes)


def _things() -> ClassTable:
    """The countable classes alone, numbered from 0."""
    whole = published_classes("cityscapes")
    things = sorted(whole.things)
    return ClassTable(
        tuple(whole.names[number] for number in things),
        numbers={idx: whole.numbers[number] for idx, number in enumerate(things)},
    )


def _read_mask(values: Values, where: str) -> Mask:
    lookup = np.full(_NUM_IDS, IGNORE_VALUE, np.uint8)
    for number, own in published_classes("cityscapes").numbers.items():
        lookup[own] = number
    return Mask(renumbered(values, lookup, np.ones(_NUM_IDS, bool), where))


def _split_ids(values: Values, where: str) -> list[tuple[int, int]]:
    """Each value that occurs, with its number in labels.py. Raises: InputError for a number that is not there."""
    ids = [(value, value // _OBJECTS_FROM if value >= _OBJECTS_FROM else value) for value in np.unique(values).tolist()]
    if odd := [value for value, own in ids if not 0 <= own < _NUM_IDS]:
        raise InputError(
            f"{where} holds the value {odd[0]}, which is of no class: values are a number 0-{_NUM_IDS - 1}, or 1000 "
            "times it and an object's; fetch it again"
        )
    return ids


def _read_instances(values: Values, where: str) -> Instances:
    """Objects of classes that are scored; a group, drawn with its class's number alone, is a crowd.

    Caravans and trailers, which have objects and no trainId, are passed over, as detectron2 does.
    """
    numbers = {own: number for number, own in _things().numbers.items()}
    objects = [
        (value, numbers[own], value < _OBJECTS_FROM) for value, own in _split_ids(values, where) if own in numbers
    ]
    return instances_of(values, objects)


def _read_panoptic(values: Values, where: str) -> Panoptic:
    table = published_classes("cityscapes")
    numbers = {own: number for number, own in table.numbers.items()}
    classes = {value: numbers[own] for value, own in _split_ids(values, where) if own in numbers}
    groups = {value for value, number in classes.items() if number in table.things and value < _OBJECTS_FROM}
    known = np.isin(values, list(classes))
    return Panoptic(np.where(known, values, 0).astype(np.int32), classes, frozenset(groups))


LAYOUTS = (
    Layout(
        name="cityscapes",
        reads="Cityscapes' 19 classes: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY/*_labelIds.png.",
        kind=Mask,
        open=partial(_open, "cityscapes", Mask, "labelIds", _read_mask),
        splits=_SPLITS,
    ),
    Layout(
        name="cityscapes-ins",
        reads="Cityscapes' objects of eight classes, from gtFine/SPLIT/CITY/*_instanceIds.png; groups are crowds.",
        kind=Instances,
        open=partial(_open, "cityscapes-ins", Instances, "instanceIds", _read_instances),
        splits=_SPLITS,
    ),
    Layout(
        name="cityscapes-pan",
        reads="Cityscapes' 19 classes as segments, from gtFine/SPLIT/CITY/*_instanceIds.png.",
        kind=Panoptic,
        open=partial(_open, "cityscapes-pan", Panoptic, "instanceIds", _read_panoptic),
        splits=_SPLITS,
    ),
)
