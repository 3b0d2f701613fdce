"""Pascal VOC's segmentation: 20 classes and background as pixels, or their objects.

    ROOT/ImageSets/Segmentation/train.txt        one name a line
         JPEGImages/2007_000032.jpg
         SegmentationClass/2007_000032.png       palette indices: 0 background, 1..20, 255 void
         SegmentationObject/2007_000032.png      palette indices: the objects from 1, 255 void

ROOT is the folder of one year, or what its archive unpacks to (VOCdevkit/VOC2012).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree, few
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import Pairs, check_split, pair_up
from dtpipe.extract.sources.layouts.published.pixels import PngLabels, Values, read_label, read_png, renumbered
from dtpipe.extract.sources.layouts.published.segments import instances_of
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import IGNORE_VALUE, Instances, Mask, Target
from dtpipe.manifests.words import count_of

_SPLITS = ("train", "val", "trainval")
_YEARS = range(2007, 2013)
_KNOWN = np.isin(np.arange(256), [*range(21), IGNORE_VALUE])


def _open(name: str, kind: type[Target], root: str, split: str | None) -> LabelledSource:
    split = check_split(name, root, split, _SPLITS)
    tree = Tree(root)
    base = _base(tree)
    names = _names(tree, f"{base}ImageSets/Segmentation/{split}.txt")
    classes = _listed(pair_up(tree, f"{base}JPEGImages", f"{base}SegmentationClass", ".png"), names, tree.root)
    masks = PngLabels(tree, tree.root, classes.labels, 1, _read_mask)
    if kind is Mask:
        return ListedSource(Mask, published_classes("voc"), classes.items, tree, masks, classes.notes)
    objects = _listed(pair_up(tree, f"{base}JPEGImages", f"{base}SegmentationObject", ".png"), names, tree.root)
    if [item.key for item in objects.items] != [item.key for item in classes.items]:
        tree.refuse_missing(_first_missing(objects, classes, base))
    targets = _ObjectLabels(tree, tree.root, objects.labels, masks)
    return ListedSource(Instances, published_classes("voc-ins"), objects.items, tree, targets, objects.notes)


@dataclass(frozen=True, eq=False)
class _ObjectLabels:
    """The objects of an image, each of the class that most of its pixels have in the other file."""

    tree: Tree
    where: str
    labels: Sequence[tuple[str, str]]
    masks: PngLabels

    def __call__(self, row: int, image_px: tuple[int, int]) -> Instances:
        name, uri = self.labels[row]
        where = f"{self.where}: {name}"
        values = read_png(read_label(self.tree, uri, where), where, image_px, 1)
        mask = self.masks(row, image_px)
        assert isinstance(mask, Mask)
        numbers = [value for value in np.unique(values).tolist() if value not in (0, IGNORE_VALUE)]
        return instances_of(
            values, [(value, _class_of(values == value, mask, where, value), False) for value in numbers]
        )


def _class_of(pixels: Values, mask: Mask, where: str, value: int) -> int:
    counts = np.bincount(mask.numbers[pixels & mask.known & (mask.numbers > 0)], minlength=2)
    if not counts.any():
        raise InputError(
            f"{where}: object {value} is of no class, since SegmentationClass holds none at its pixels; "
            "both files must be of one release"
        )
    return int(counts.argmax()) - 1  # without background


def _read_mask(values: Values, where: str) -> Mask:
    return Mask(renumbered(values, np.arange(256, dtype=np.uint8), _KNOWN, where))


def _base(tree: Tree) -> str:
    """The folder of the year below the root, with a slash, or nothing. Raises: InputError for none, or several."""
    if tree.has("JPEGImages"):
        return ""
    below = [f"{above}VOC{year}/" for above in ("VOCdevkit/", "") for year in _YEARS]
    years = [base for base in below if tree.has(f"{base}JPEGImages")]
    if len(years) > 1:
        raise InputError(f"{tree.root}: holds {few(years)}; name one of them, such as {tree.root}/{years[-1][:-1]}")
    return years[0] if years else tree.refuse_missing("JPEGImages")


def _names(tree: Tree, listing: str) -> Sequence[str]:
    """Raises: InputError for a list that is not there, empty, or names an image twice."""
    lines = tree.read_named(listing).decode("utf-8", "replace").splitlines()
    names = [line.split()[0] for line in lines if line.split()]
    if twice := [name for name, num in Counter(names).items() if num > 1]:
        raise InputError(f"{tree.root}: {listing} names {few(twice)} twice; leave each once")
    if not names:
        raise InputError(f"{tree.root}: {listing} names no image; fetch it again")
    return names


def _listed(pairs: Pairs, names: Sequence[str], root: str) -> Pairs:
    """The pairs that a list names. Raises: InputError when none is there."""
    rows = {item.key.rpartition(".")[0]: row for row, item in enumerate(pairs.items)}
    missing = [name for name in names if name not in rows]
    chosen = sorted(rows[name] for name in names if name in rows)
    if not chosen:
        raise InputError(
            f"{root}: none of the {count_of(len(names), 'image')} of the list is there, {names[0]} for one"
        )
    notes = (f"left out {count_of(len(missing), 'image')} of the list without image or label: {few(missing)}",)
    return Pairs([pairs.items[row] for row in chosen], [pairs.labels[row] for row in chosen], notes if missing else ())


def _first_missing(objects: Pairs, classes: Pairs, base: str) -> str:
    keys = {item.key for item in objects.items} ^ {item.key for item in classes.items}
    key = min(keys)
    folder = "SegmentationObject" if key in {item.key for item in classes.items} else "SegmentationClass"
    return f"{base}{folder}/{key.rpartition('.')[0]}.png"


LAYOUTS = (
    Layout(
        name="voc",
        reads="Pascal VOC's 21 classes of pixels: JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt.",
        kind=Mask,
        open=partial(_open, "voc", Mask),
        splits=_SPLITS,
    ),
    Layout(
        name="voc-ins",
        reads="Pascal VOC's objects of 20 classes, from SegmentationObject and SegmentationClass.",
        kind=Instances,
        open=partial(_open, "voc-ins", Instances),
        splits=_SPLITS,
    ),
)
