"""Labelled images for evaluation: a source's images, its class folders or masks beside it, and a split by key.

A mask is an image file of the sample's key (any of PNG, TIFF, GIF, BMP suffixes): each pixel's value is a class, 0 is background.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.manifests.errors import InputError
from dtpipe.manifests.schema import TransformRecipe

if TYPE_CHECKING:
    from dtpipe.distill.downstream.base import LabelledSet
    from dtpipe.extract.sources.base import Source, SourceItem

MAX_PIXELS = 128_000_000
IGNORED = 255
Mask = NDArray[np.uint8]


def split_by_key(
    keys: Sequence[str], labels: Sequence[str | None], test_share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Rows to draw labelled images from, and rows held out; each class is split alike.

    A row's side depends on the seed and the keys of its class only, not on their order.
    """
    train: list[int] = []
    test: list[int] = []
    for label in dict.fromkeys(labels):
        rows = [row for row, each in enumerate(labels) if each == label]
        rows.sort(key=lambda row: blake3(f"{seed}/split/{keys[row]}".encode()).digest())
        cut = round(test_share * len(rows))
        test += rows[:cut]
        train += rows[cut:]
    return sorted(train), sorted(test)


def decode_mask(data: bytes, where: str) -> Mask:
    """Class of each pixel. Shapes: -> (H, W) uint8. Raises: InputError when it is no single-channel image."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            values = np.asarray(image)
    except Exception as err:
        raise InputError(
            f"mask {where} cannot be read: {type(err).__name__}: {err}; masks are PNG files of class numbers"
        ) from err
    if values.ndim == 3 and values.shape[-1] >= 3 and (values[..., :1] == values[..., :3]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.min(initial=0) < 0 or values.max(initial=0) > IGNORED:
        raise InputError(
            f"mask {where} is a {values.dtype} image of shape {values.shape}; it must hold one class number 0..255 per pixel"
        )
    return values.astype(np.uint8)


def resize_mask(mask: Mask, recipe: TransformRecipe) -> Mask:
    """The mask as its image is resized, by nearest neighbour. Shapes: (H, W) -> (recipe.height, recipe.width)."""
    height, width = recipe.height, recipe.width
    if recipe.resize == "center_crop":
        scale = max(height / mask.shape[0], width / mask.shape[1])
        covered = _nearest(mask, (round(mask.shape[0] * scale), round(mask.shape[1] * scale)))
        top, left = (covered.shape[0] - height) // 2, (covered.shape[1] - width) // 2
        return covered[top : top + height, left : left + width]
    return _nearest(mask, (height, width))


def _nearest(mask: Mask, size: tuple[int, int]) -> Mask:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, mask.shape, strict=True)
    )
    picked: Mask = mask[rows[:, None], columns[None, :]]
    return picked


class LabelledReader:
    """Reads samples of one source, with masks where there is a folder of them."""

    def __init__(self, images: str, masks: str | None, recipe: TransformRecipe, source_kind: str = "auto") -> None:
        from dtpipe.extract.sources.registry import open_source

        self.images, self.masks, self.recipe = images, masks, recipe
        self.source = open_source(images, source_kind)
        self.items: Sequence[SourceItem] = self.source.list()
        self.mask_source: Source | None = open_source(masks) if masks else None
        self.mask_uris = {_stem(item.key): item.uri for item in self.mask_source.list()} if self.mask_source else {}

    def read(
        self, class_names: Sequence[str], note: Callable[[str], None], rows: Sequence[int], prefix: str = ""
    ) -> LabelledSet:
        """The samples at `rows` of the listing, `prefix` before their keys; bad images are named and left out.

        Raises: InputError when a mask is missing or a class is unknown, or no image is good.
        """
        from dtpipe.distill.downstream.base import LabelledSet

        images, masks, keys, labels = [], [], [], []
        for row in rows:
            item = self.items[row]
            found = self._read_image(item, note)
            if found is None:
                continue
            images.append(found)
            keys.append(prefix + item.key)
            labels.append(_class_idx(item, class_names))
            if self.mask_source is not None:
                masks.append(self._read_mask(item))
        if not images:
            raise InputError(f"{self.images}: no image can be used; see the notes above")
        labelled = bool(class_names)
        return LabelledSet(
            np.stack(images),
            tuple(keys),
            np.asarray(labels) if labelled else None,
            np.stack(masks) if masks else None,
            tuple(class_names),
        )

    def _read_image(self, item: SourceItem, note: Callable[[str], None]) -> NDArray[np.uint8] | None:
        from dtpipe.extract.sources.images import decode_image, resize_image
        from dtpipe.manifests.errors import BadImage

        try:
            return resize_image(decode_image(self.source.read(item.uri), MAX_PIXELS), self.recipe)
        except BadImage as err:
            note(f"left out {item.key}: {err.reason}")
            return None

    def _read_mask(self, item: SourceItem) -> Mask:
        uri = self.mask_uris.get(_stem(item.key))
        if uri is None or self.mask_source is None:
            raise InputError(
                f"{self.masks}: no mask for image {item.key}; masks have the images' paths, e.g. {_stem(item.key)}.png"
            )
        return resize_mask(decode_mask(self.mask_source.read(uri), item.key), self.recipe)


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


def _class_idx(item: SourceItem, class_names: Sequence[str]) -> int:
    if not class_names:
        return 0
    if item.label not in class_names:
        raise InputError(
            f"{item.key}: class {item.label!r} is not among the classes to learn from, {', '.join(class_names)}"
        )
    return class_names.index(item.label)


def class_names_of(items: Sequence[Any]) -> tuple[str, ...]:
    """Sorted class names, or none when some sample has no label."""
    names: Mapping[str | None, None] = dict.fromkeys(item.label for item in items)
    return () if None in names else tuple(sorted(str(name) for name in names))
