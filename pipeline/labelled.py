"""Labelled images for evaluation: a source's images, its class folders or masks beside it, and a split by key.

A mask is an image file of the sample's key (any of PNG, TIFF, GIF, BMP suffixes): each pixel's value is a class, 0 is
background.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.extract.config import SourceConfig
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, ConfigError, InputError
from dtpipe.manifests.labels import IGNORE_VALUE, Class, ClassTable, Mask, Target, class_table
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.cli.console import Note

KEPT_BYTES = 1 << 30  # of decoded images and masks that a reader keeps in memory; what is beyond is read again
Pixels = NDArray[np.uint8]


def split_by_key(
    keys: Sequence[str], labels: Sequence[str | None], test_share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Rows to draw labelled images from, and rows held out; each class is split alike.

    A row's side depends on the seed and the keys of its class only, not on their order.
    """
    train: list[int] = []
    test: list[int] = []
    for label in dict.fromkeys(labels):
        rows = [row for row, own in enumerate(labels) if own == label]
        rows.sort(key=lambda row: blake3(f"{seed}/split/{keys[row]}".encode()).digest())
        cut = round(test_share * len(rows))
        test += rows[:cut]
        train += rows[cut:]
    return sorted(train), sorted(test)


def decode_mask(data: bytes, where: str) -> Pixels:
    """Class of each pixel. Shapes: -> (H, W) uint8. Raises: InputError when it is no single-channel image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            values = np.asarray(image)
    except Exception as err:
        raise InputError(
            f"mask {where} cannot be read: {type(err).__name__}: {err}; masks are PNG files of class numbers"
        ) from err
    if values.ndim == 3 and values.shape[-1] >= 3 and (values[..., :1] == values[..., :3]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise InputError(
            f"mask {where} is a {values.dtype} image of shape {values.shape}; "
            "it must hold one class number 0..255 per pixel"
        )
    return values.astype(np.uint8)


def resize_mask(mask: Pixels, recipe: TransformRecipe) -> Pixels:
    """The mask as its image is resized, by nearest neighbour. Shapes: (H, W) -> (recipe.height, recipe.width)."""
    height, width = recipe.height, recipe.width
    if recipe.resize == "center_crop":
        scale = max(height / mask.shape[0], width / mask.shape[1])
        covered = _nearest(mask, (round(mask.shape[0] * scale), round(mask.shape[1] * scale)))
        top, left = (covered.shape[0] - height) // 2, (covered.shape[1] - width) // 2
        return covered[top : top + height, left : left + width]
    return _nearest(mask, (height, width))


def _nearest(mask: Pixels, size: tuple[int, int]) -> Pixels:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, mask.shape, strict=True)
    )
    picked: Pixels = mask[rows[:, None], columns[None, :]]
    return picked


class LabelledReader:
    """The samples of one source, with masks where there is a folder of them; each is read when it is asked for."""

    def __init__(
        self, images: str, masks: str | None, recipe: TransformRecipe, ignore_value: int | None = IGNORE_VALUE
    ) -> None:
        self.images, self.masks, self.recipe, self.ignore_value = images, masks, recipe, ignore_value
        self._source = open_source(images)
        self.items = self._source.list()
        self._mask_source = open_source(masks) if masks else None
        self._mask_uris = {_stem(item.key): item.uri for item in self._mask_source.list()} if self._mask_source else {}
        self._kept: dict[tuple[str, int], Pixels] = {}
        self._free_bytes = KEPT_BYTES

    def select(
        self, rows: Sequence[int], note: Note, classes: ClassTable | None = None, prefix: str = ""
    ) -> LabelledSet:
        """The samples at `rows` of the listing, `prefix` before their keys; bad images are named and left out.

        Each is read once here, so that what is wrong is said before any work. `classes` are those to learn from, by
        default the class folders'; with masks they are counted.

        Raises: InputError when a mask is missing or a class is unknown, or no image is good; ConfigError when there is
        nothing to learn from.
        """
        digests = self._digests(rows, note)
        good = list(digests)
        keys = [self.items[row].key for row in good]
        kind: type[Target]
        target: Callable[[int], Target]
        if self._mask_source is not None:
            table = ClassTable.numbered(1 + max(self.mask(row).largest for row in good))
            kind, target = Mask, lambda idx: self.mask(good[idx])
        else:
            table = classes or self._class_folders()
            numbers = [table.number(self.items[row].label, key) for row, key in zip(good, keys, strict=True)]
            kind, target = Class, lambda idx: Class(numbers[idx])
        own_keys = tuple(prefix + key for key in keys)
        return LabelledSet(own_keys, kind, table, lambda idx: self.image(good[idx]), target, tuple(digests.values()))

    def _class_folders(self) -> ClassTable:
        table = class_table(item.label for item in self.items)
        if table is None:
            raise ConfigError(
                f"{self.images}: no class folders and no --masks; give one of them, or there is nothing to score"
            )
        return table

    def _digests(self, rows: Sequence[int], note: Note) -> dict[int, str]:
        """The rows of good images with the digests of their pixels."""
        digests = {}
        for row in rows:
            try:
                digests[row] = blake3(self.image(row).tobytes()).hexdigest()
            except BadImage as err:
                note(f"left out {self.items[row].key}: {err.reason}")
        if not digests:
            raise InputError(f"{self.images}: no image can be used; see the notes above")
        return digests

    def image(self, row: int) -> Pixels:
        """An image of the listing, at its size. Shapes: -> (recipe.height, recipe.width, 3). Raises: BadImage."""

        def read() -> Pixels:
            data = self._source.read(self.items[row].uri)
            return resize_image(decode_image(data, SourceConfig().max_pixels), self.recipe)

        return self._keep(("image", row), read)

    def mask(self, row: int) -> Mask:
        """Its mask, resized as the image is. Raises: InputError when there is none."""
        key = self.items[row].key
        uri = self._mask_uris.get(_stem(key))
        if uri is None or self._mask_source is None:
            raise InputError(
                f"{self.masks}: no mask for image {key}; masks have the images' paths, e.g. {_stem(key)}.png"
            )
        source = self._mask_source
        numbers = self._keep(("mask", row), lambda: resize_mask(decode_mask(source.read(uri), key), self.recipe))
        return Mask(numbers, self.ignore_value)

    def _keep(self, name: tuple[str, int], read: Callable[[], Pixels]) -> Pixels:
        if name in self._kept:
            return self._kept[name]
        pixels = read()
        if pixels.nbytes <= self._free_bytes:
            self._kept[name] = pixels
            self._free_bytes -= pixels.nbytes
        return pixels


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))
