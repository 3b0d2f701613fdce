"""Masks beside images: each image's mask has its path, below another root or in another source, and any ending.

Names of the classes come from a text or JSON file. Without one the classes are counted, by whoever reads the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.base import Layout
from dtpipe.extract.sources.layouts.class_names import parse_class_names
from dtpipe.extract.sources.layouts.files import Tree, few, read_file
from dtpipe.extract.sources.layouts.generic.folders import both_parts
from dtpipe.extract.sources.layouts.listed import ListedSource, ReadsUris, Reopened
from dtpipe.extract.sources.layouts.mask_files import check_classes, check_shape, decode_mask
from dtpipe.extract.sources.names import without_ending
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, ConfigError, InputError
from dtpipe.manifests.labels import IGNORE_VALUE, ClassTable, Mask
from dtpipe.manifests.words import count_of

_NAMES = ("classes.txt", "classes.json")
UNNAMED = ClassTable(())
"""Of masks whose classes nobody has named; they are known by their numbers once they are counted."""


def open_masks_beside(
    images: str, masks: str, ignore_value: int | None = IGNORE_VALUE, class_names: str | None = None
) -> ListedSource:
    """The images of one source with the masks of another, by path without ending; `class_names` names a file.

    Raises: InputError for an image without a mask or with two, and for names that cannot be read.
    """
    table = parse_class_names(read_file(class_names), class_names) if class_names else UNNAMED
    source, mask_source = open_source(images), open_source(masks)
    readers = [Reopened(partial(open_source, url, own.kind)) for url, own in ((images, source), (masks, mask_source))]
    return _join(source.list(), readers[0], mask_source.list(), readers[1], masks, table, ignore_value)


def open_masks(root: str, split: str | None = None, ignore_value: int | None = IGNORE_VALUE) -> ListedSource:
    """`images/` and `masks/` below a root, or a split's folder in each.

    Raises: as `open_masks_beside`; ConfigError when a split must be named.
    """
    tree = Tree(root)
    if split is None and (parts := both_parts(tree.names("images"))):
        raise ConfigError(f"masks:{root}: images/ is divided into {' and '.join(parts)}; write masks:{root}@{parts[0]}")
    images, masks = (_in_split(tree, part, split) for part in ("images", "masks"))
    names = next((name for name in _NAMES if tree.has(name)), None)
    table = parse_class_names(tree.read_named(names), f"{root}/{names}") if names else UNNAMED
    where = f"{tree.root}/masks{f'/{split}' if split else ''}"
    return _join(images, tree, masks, tree, where, table, ignore_value)


def _in_split(tree: Tree, part: str, split: str | None) -> list[SourceItem]:
    under = f"{part}/{split}" if split else part
    items = sorted(tree.images(under).values(), key=lambda item: item.key)
    if not items:
        raise InputError(f"{tree.root}: no image in {under}; check root and split")
    return items


def _join(
    items: Sequence[SourceItem],
    images: ReadsUris,
    masks: Sequence[SourceItem],
    mask_images: ReadsUris,
    where: str,
    table: ClassTable,
    ignore_value: int | None,
) -> ListedSource:
    by_stem: dict[str, list[SourceItem]] = {}
    for mask in masks:
        by_stem.setdefault(without_ending(mask.key), []).append(mask)
    own = tuple(_mask_of(item.key, by_stem, where) for item in items)
    notes = []
    if spare := sorted(by_stem.keys() - {without_ending(item.key) for item in items}):
        names = few([by_stem[stem][0].key for stem in spare])
        notes.append(f"left out {count_of(len(spare), 'mask')} without an image: {names}")
    return ListedSource(Mask, table, items, images, MaskTargets(mask_images, own, where, table, ignore_value), notes)


@dataclass(frozen=True, eq=False)
class MaskTargets:
    """Reads the mask of each row."""

    masks: ReadsUris
    items: tuple[SourceItem, ...]
    where: str
    table: ClassTable
    ignore_value: int | None

    def __call__(self, row: int, image_px: tuple[int, int]) -> Mask:
        """Raises: InputError for a mask that cannot be read, of another aspect, or of an unknown class."""
        item = self.items[row]
        try:
            mask = Mask(decode_mask(self.masks.read(item.uri), item.key), self.ignore_value)
        except BadImage as err:
            raise InputError(f"{self.where}: mask {item.key} cannot be read: {err.reason}; put it there") from err
        check_shape(mask.numbers, image_px, item.key)
        check_classes(mask, self.table, item.key)
        return mask


def _mask_of(key: str, by_stem: Mapping[str, Sequence[SourceItem]], where: str) -> SourceItem:
    items = by_stem.get(without_ending(key), [])
    if not items:
        seen = next(iter(by_stem.values()))[0].key
        raise InputError(
            f"{where}: no mask for image {key}; masks have the images' paths, here {without_ending(key)}.png; "
            f"{seen} is one that is there"
        )
    if len(items) > 1:
        names = " and ".join(item.key for item in items)
        raise InputError(f"{where}: image {key} has the masks {names}; leave one of them")
    return items[0]


LAYOUT = Layout(
    "masks",
    "masks:ROOT@SPLIT: ROOT/images/SPLIT and masks of the same paths in ROOT/masks/SPLIT; names in ROOT/classes.txt.",
    Mask,
    open_masks,
    open_masks,
)
