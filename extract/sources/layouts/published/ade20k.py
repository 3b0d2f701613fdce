"""ADE20K as the scene parsing benchmark publishes it (ADEChallengeData2016): a mask of 150 classes for each image.

    ROOT/images/training/ADE_train_00000001.jpg      annotations/training/ADE_train_00000001.png

A pixel holds 1..150; 0 is "other", which nobody learns or scores.
"""

from __future__ import annotations

import numpy as np

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import check_split, pair_up
from dtpipe.extract.sources.layouts.published.pixels import PngLabels, Values, renumbered
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.manifests.labels import IGNORE_VALUE, Mask

_NAME, _SPLITS = "ade20k", ("training", "validation")
_OTHER, _NUM_CLASSES = 0, 150
_LOOKUP = np.array([IGNORE_VALUE, *range(_NUM_CLASSES)], np.uint8)


def _open(root: str, split: str | None) -> LabelledSource:
    split = check_split(_NAME, root, split, _SPLITS)
    tree = Tree(root)
    pairs = pair_up(tree, f"images/{split}", f"annotations/{split}", ".png")
    targets = PngLabels(tree, tree.root, pairs.labels, 1, _read_mask)
    return ListedSource(Mask, published_classes(_NAME), pairs.items, tree, targets, pairs.notes)


def _read_mask(values: Values, where: str) -> Mask:
    return Mask(renumbered(values, _LOOKUP, np.ones(len(_LOOKUP), bool), where))


LAYOUT = Layout(
    name=_NAME,
    reads="ADE20K's 150 classes of scene parsing: images/SPLIT and annotations/SPLIT; 0, other, is ignored.",
    kind=Mask,
    open=_open,
    splits=_SPLITS,
)
