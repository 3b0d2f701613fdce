"""The data sets of the label-efficient benchmark (ddpm-segmentation): a few dozen square images with parts of things.

    ROOT/real/train/0.png   real/train/0.npy   real/test/..      ROOT is bedroom_28, ffhq_34, cat_15, horse_21, ..
         ddpm/0.png   ddpm/0.npy        samples of the DDPM that were annotated too: split ddpm

A mask is an array of class numbers in the .npy beside its image, of any square size. Of bedrooms nobody learns or
scores the background, 0; elsewhere background is a class and 255 is ignored. `Mask.without_specks` is the
benchmark's cleaning of training masks. Source: yandex-research/ddpm-segmentation, src/datasets.py and experiments/.
Differs: whoever resizes masks here takes the nearest pixel to a centre, and OpenCV there the one up and left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import check_split, pair_up
from dtpipe.extract.sources.layouts.published.pixels import read_array, read_label, renumbered
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Mask

_NAME, _SPLITS = "ddpm-seg", ("train", "test", "ddpm")
_IGNORED = {"bedroom_28": 0, **dict.fromkeys(("ffhq_34", "cat_15", "horse_21", "celeba_19", "ade_bedroom_30"), 255)}


def _open(root: str, split: str | None) -> LabelledSource:
    split = check_split(_NAME, root, split, _SPLITS)
    tree = Tree(root)
    set_name = tree.root.rpartition("/")[2].removesuffix(".zip").removesuffix(".tar")
    if set_name not in _IGNORED:
        raise ConfigError(
            f"{_NAME}:{root}: {set_name!r} is no set of this benchmark, whose classes are known by the folder's name: "
            f"{', '.join(_IGNORED)}; name it so"
        )
    folder = split if split == "ddpm" else f"real/{split}"
    pairs = pair_up(tree, folder, folder, ".npy")
    table = published_classes(set_name)
    targets = _ArrayLabels(tree, tree.root, pairs.labels, len(table), _IGNORED[set_name])
    return ListedSource(Mask, table, pairs.items, tree, targets, pairs.notes)


@dataclass(frozen=True, eq=False)
class _ArrayLabels:
    """Masks from arrays, at their own size."""

    tree: Tree
    where: str
    labels: Sequence[tuple[str, str]]
    num_classes: int
    ignore: int

    def __call__(self, row: int, image_px: tuple[int, int]) -> Mask:
        name, uri = self.labels[row]
        where = f"{self.where}: {name}"
        if image_px[0] != image_px[1]:
            raise InputError(f"{where}: its image has {image_px[1]}x{image_px[0]} px; this benchmark's are square")
        values = read_array(read_label(self.tree, uri, where), where)
        if values.shape[0] != values.shape[1]:
            raise InputError(f"{where} has shape {values.shape}; a mask is a square of class numbers; fetch it again")
        known = np.isin(np.arange(256), [*range(self.num_classes), self.ignore])
        numbers = renumbered(values, np.arange(256, dtype=np.uint8), known, where)
        return Mask(numbers, self.ignore)


LAYOUT = Layout(
    name=_NAME,
    reads="A set of the label-efficient benchmark (ROOT/bedroom_28, ffhq_34, ..): real/SPLIT or ddpm, .npy masks.",
    kind=Mask,
    open=_open,
    splits=_SPLITS,
    cleans_specks=True,
)
