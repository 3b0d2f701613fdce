"""The data sets of the label-efficient benchmark (ddpm-segmentation): a few dozen square images with parts of things.

    ROOT/real/train/0.png   real/train/0.npy   real/test/..      ROOT is bedroom_28, ffhq_34, cat_15, horse_21, ..
         ddpm/0.png   ddpm/0.npy        samples of the DDPM that were annotated too: split ddpm

A mask is an array of class numbers in the .npy beside its image, of any square size. Of bedrooms nobody learns or
scores the background, 0; elsewhere background is a class and 255 is ignored. `Mask.without_specks` is the
benchmark's cleaning of training masks. Source: yandex-research/ddpm-segmentation, src/datasets.py and experiments/.
Differs: whoever resizes masks here takes the nearest pixel to a centre, and OpenCV there the one up and left of it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import check_split, pair_up
from dtpipe.extract.sources.layouts.published.pixels import Values, read_label, renumbered
from dtpipe.extract.sources.layouts.published.tables import published_classes
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Mask

_NAME, _SPLITS = "ddpm-seg", ("train", "test", "ddpm")
_IGNORED = {"bedroom_28": 0, **dict.fromkeys(("ffhq_34", "cat_15", "horse_21", "celeba_19", "ade_bedroom_30"), 255)}
_MAX_PX = 4096  # a side of a mask


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
        values = _read_array(read_label(self.tree, uri, where), where)
        known = np.isin(np.arange(256), [*range(self.num_classes), self.ignore])
        numbers = renumbered(values, np.arange(256, dtype=np.uint8), known, where)
        return Mask(numbers, self.ignore)


def _read_array(data: bytes, where: str) -> Values:
    """A square array of whole numbers. Raises: InputError; what holds objects is not unpickled."""
    again = "fetch it again"
    try:
        with np.errstate(invalid="ignore"):
            file = io.BytesIO(data)
            shape = _shape(file)
            if len(shape) != 2 or shape[0] != shape[1] or not 0 < shape[0] <= _MAX_PX:
                raise InputError(f"{where} has shape {shape}; a mask is a square of class numbers; {again}")
            file.seek(0)
            values = np.load(file, allow_pickle=False)
            numbers: Values = values.astype(np.int64)
    except InputError:
        raise
    except Exception as err:  # readers raise what they like
        raise InputError(f"{where} is no array of numbers that can be read ({err}); {again}") from err
    odd = values[numbers != values]
    if odd.size:
        raise InputError(f"{where} holds {odd[0]}, which is no class number; {again}")
    return numbers


def _shape(file: io.BytesIO) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return tuple(read(file)[0])


LAYOUT = Layout(
    name=_NAME,
    reads="A set of the label-efficient benchmark (ROOT/bedroom_28, ffhq_34, ..): real/SPLIT or ddpm, .npy masks.",
    kind=Mask,
    open=_open,
    splits=_SPLITS,
    cleans_specks=True,
)
