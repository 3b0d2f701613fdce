"""BDD100K's segmentations of its 10k images: classes of pixels, objects, or both as segments.

    ROOT/images/10k/train/0004a4c0-d4dff0ad.jpg
         labels/sem_seg/masks/train/0004a4c0-d4dff0ad.png        19 classes, 255 unknown
         labels/ins_seg/bitmasks/train/0004a4c0-d4dff0ad.png     or rles/ins_seg_train.json, polygons/ins_seg_train.json
         labels/pan_seg/bitmasks/train/0004a4c0-d4dff0ad.png     40 classes

A pixel of a bitmask holds in R the class, 0 where there is none; in G truncated, occluded, crowd and ignored, from
bit 3 down to 0; in B and A the object, (B << 8) + A. Source: bdd100k/bdd100k, doc/source/format.rst, label/to_mask.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import check_split, pair_up
from dtpipe.extract.sources.layouts.published.pixels import PngLabels, Values, renumbered
from dtpipe.extract.sources.layouts.published.scalabel import open_scalabel
from dtpipe.extract.sources.layouts.published.segments import instances_of
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import IGNORE_VALUE, Instances, Mask, Panoptic, Target

_SPLITS = ("train", "val")
_CROWD_OR_IGNORED = 0b11
_KNOWN = np.isin(np.arange(256), [*range(19), IGNORE_VALUE])
_FIRST_THING = 31  # of 40 classes


def _open(
    name: str, kind: type[Target], folder: str, channels: int, read: Callable[[Values, str], Target],
    root: str, split: str | None,
) -> LabelledSource:  # fmt: skip
    split = check_split(name, root, split, _SPLITS)
    tree = Tree(root)
    pairs = pair_up(tree, f"images/10k/{split}", f"labels/{folder}/{split}", ".png")
    targets = PngLabels(tree, tree.root, pairs.labels, channels, read)
    return ListedSource(kind, published_classes(name), pairs.items, tree, targets, pairs.notes)


def _open_instances(root: str, split: str | None) -> LabelledSource:
    """From bitmasks where they are there, else from run lengths, else from polygons."""
    split = check_split("bdd100k-ins", root, split, _SPLITS)
    tree = Tree(root)
    labels = "labels/ins_seg"
    for name in (f"{labels}/rles/ins_seg_{split}.json", f"{labels}/polygons/ins_seg_{split}.json"):
        if not tree.has(f"{labels}/bitmasks/{split}") and tree.has(name):
            return open_scalabel(tree, f"images/10k/{split}", name, published_classes("bdd100k-ins"))
    return _open("bdd100k-ins", Instances, "ins_seg/bitmasks", 4, _read_instances, root, split)


def _read_mask(values: Values, where: str) -> Mask:
    return Mask(renumbered(values, np.arange(256, dtype=np.uint8), _KNOWN, where))


def _pack(values: Values) -> NDArray[np.int64]:
    """Class, object and attributes of each pixel in one number. Shapes: (H, W, 4) -> (H, W)."""
    red, green, blue, alpha = np.moveaxis(values.astype(np.int64), -1, 0)
    packed: NDArray[np.int64] = (red << 24) + (((blue << 8) + alpha) << 8) + green
    return packed


def _unpack(packed: int) -> tuple[int, int, bool]:
    """Class as in the file, object, and whether it is a crowd or ignored."""
    return packed >> 24, (packed >> 8) & 0xFFFF, bool(packed & _CROWD_OR_IGNORED)


def _check_class(own: int, num_classes: int, where: str) -> None:
    if own > num_classes:
        raise InputError(f"{where} holds the class {own}, and there are {num_classes}; is it a bitmask of this task?")


def _read_instances(values: Values, where: str) -> Instances:
    packed = _pack(values)
    objects = []
    for value in np.unique(packed).tolist():
        own, _, unscored = _unpack(value)
        _check_class(own, len(published_classes("bdd100k-ins")), where)
        if own:
            objects.append((value, own - 1, unscored))
    return instances_of(packed, objects)


def _read_panoptic(values: Values, where: str) -> Panoptic:
    """Segments numbered by (class, object), of stuff by class, in this order."""
    packed = _pack(values)
    parts = np.unique(packed)
    crowds: dict[tuple[int, int], bool] = {}
    owners = []
    for value in parts.tolist():
        own, thing, unscored = _unpack(value)
        _check_class(own, len(published_classes("bdd100k-pan")), where)
        owner = (own, thing if own >= _FIRST_THING else 0)
        owners.append(owner)
        crowds[owner] = crowds.get(owner, True) and unscored
    ids = {owner: idx for idx, owner in enumerate(sorted(crowds.keys() - {(0, 0)}), start=1)} | {(0, 0): 0}
    lookup = np.array([ids[owner] for owner in owners], np.int32)
    return Panoptic(
        lookup[np.searchsorted(parts, packed)],
        {idx: own - 1 for (own, _), idx in ids.items() if idx},
        frozenset(ids[owner] for owner, unscored in crowds.items() if unscored and ids[owner]),
    )


LAYOUTS = (
    Layout(
        name="bdd100k-ins",
        reads="BDD100K's objects of 8 classes: images/10k/SPLIT and labels/ins_seg (bitmasks, rles or polygons).",
        kind=Instances,
        open=_open_instances,
        splits=_SPLITS,
    ),
    Layout(
        name="bdd100k-sem",
        reads="BDD100K's 19 classes of pixels: images/10k/SPLIT and labels/sem_seg/masks/SPLIT.",
        kind=Mask,
        open=partial(_open, "bdd100k-sem", Mask, "sem_seg/masks", 1, _read_mask),
        splits=_SPLITS,
    ),
    Layout(
        name="bdd100k-pan",
        reads="BDD100K's 40 classes as segments: images/10k/SPLIT and labels/pan_seg/bitmasks/SPLIT.",
        kind=Panoptic,
        open=partial(_open, "bdd100k-pan", Panoptic, "pan_seg/bitmasks", 4, _read_panoptic),
        splits=_SPLITS,
    ),
)
