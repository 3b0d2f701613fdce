"""The annotated images of DatasetGAN: a few dozen samples of a StyleGAN with parts of things, and photographs.

    ROOT/annotation/training_data/face_processed/image_0.jpg   image_mask0.npy
         annotation/testing_data/face_34_class/..              images and .npy files, paired in the order of their names

ROOT is the release's folder (dataset_release). A mask is an array of class numbers of any scale; background is class 0.
Source: nv-tlabs/datasetGAN_release, experiments/*.json, train_interpreter.py and test_deeplab_cross_validation.py. That
code never says how test files are called, so they are paired as it does. Its bedrooms have no file of settings and are
no set here. Differs: there a class of fewer than 30 px is painted over with 0 in training; here nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree, few
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.mask_files import check_shape
from dtpipe.extract.sources.layouts.published.pairs import Pairs, check_split, left_over
from dtpipe.extract.sources.layouts.published.pixels import read_array, read_label, renumbered
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.extract.sources.names import without_ending
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Mask
from dtpipe.manifests.words import count_of

_NAME, _ENDING = "datasetgan", ".npy"
_TRAINING, _TESTING = "annotation/training_data", "annotation/testing_data"
_FACES, _CARS, _CAR_PARTS, _CATS = "ffhq_34", "datasetgan_car_20", "datasetgan_car_12", 16
_FOLDERS: dict[str, tuple[str, str | int]] = {
    "face-train": (f"{_TRAINING}/face_processed", _FACES),
    "face-test": (f"{_TESTING}/face_34_class", _FACES),
    "car-train": (f"{_TRAINING}/car_processed", _CARS),
    "car-test": (f"{_TESTING}/car_20_class", _CARS),
    "car-ade-test": (f"{_TESTING}/car_ade_12_class", _CAR_PARTS),
    "cat-train": (f"{_TRAINING}/cat_processed", _CATS),
    "cat-test": (f"{_TESTING}/cat_16_class", _CATS),
}
"""Folder of a split, and its classes: a published table, or their number where nobody has named them."""
_SPLITS = tuple(_FOLDERS)


def _open(root: str, split: str | None) -> LabelledSource:
    split = check_split(_NAME, root, split, _SPLITS)
    tree, (folder, classes) = Tree(root), _FOLDERS[split]
    pairs = _by_number(tree, folder) if folder.startswith(_TRAINING) else _by_order(tree, folder)
    table = ClassTable.numbered(classes) if isinstance(classes, int) else published_classes(classes)
    targets = _PartLabels(tree, tree.root, pairs.labels, len(table))
    return ListedSource(Mask, table, pairs.items, tree, targets, pairs.notes)


def _by_number(tree: Tree, folder: str) -> Pairs:
    """`image_7.jpg` and `image_mask7.npy`."""
    items = [item for _, item in sorted(tree.images(folder).items())]
    labels = _labels(tree, folder)
    names = {item.key: without_ending(item.key).replace("image_", "image_mask", 1) + _ENDING for item in items}
    paired = [item for item in items if names[item.key] in labels]
    if not paired:
        raise InputError(
            f"{tree.root}: no image_0.jpg in {folder} has its image_mask0.npy; there is "
            f"{few(sorted([*names, *labels])) or 'nothing'}; check the root"
        )
    alone = [item.key for item in items if names[item.key] not in labels]
    unused = sorted(labels.keys() - names.values())
    rows = [(f"{folder}/{names[item.key]}", labels[names[item.key]]) for item in paired]
    return Pairs(paired, rows, left_over(alone, folder, unused, folder))


def _by_order(tree: Tree, folder: str) -> Pairs:
    """The first image and the first array, by their names, and so on. Raises: InputError where they are not as many."""
    items = [item for _, item in sorted(tree.images(folder).items())]
    labels = sorted(_labels(tree, folder).items())
    if len(items) != len(labels) or not items:
        raise InputError(
            f"{tree.root}: {folder} has {count_of(len(items), 'image')} and {count_of(len(labels), 'array')}, and they "
            "are paired in the order of their names; fetch what is missing, and take away what is not theirs"
        )
    return Pairs(items, [(f"{folder}/{name}", uri) for name, uri in labels], ())


def _labels(tree: Tree, folder: str) -> dict[str, str]:
    return {name.removeprefix(f"{folder}/"): uri for name, uri in tree.files(folder).items() if name.endswith(_ENDING)}


@dataclass(frozen=True, eq=False)
class _PartLabels:
    """Masks from arrays, at their own size."""

    tree: Tree
    where: str
    labels: Sequence[tuple[str, str]]
    num_classes: int

    def __call__(self, row: int, image_px: tuple[int, int]) -> Mask:
        name, uri = self.labels[row]
        where = f"{self.where}: {name}"
        values = read_array(read_label(self.tree, uri, where), where)
        check_shape(values, image_px, where)
        known = np.isin(np.arange(256), range(self.num_classes))
        return Mask(renumbered(values, np.arange(256, dtype=np.uint8), known, where))


LAYOUT = Layout(
    name=_NAME,
    reads="DatasetGAN's annotated faces, cars and cats: training_data and testing_data in ROOT/annotation, .npy masks.",
    kind=Mask,
    open=_open,
    splits=_SPLITS,
)
