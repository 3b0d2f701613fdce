"""Labelled images for evaluation: a source's images, its class folders or masks beside it, and a split by key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from blake3 import blake3

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.extract.config import SourceConfig
from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.labels import IGNORE_VALUE, Class, ClassTable, Mask, Pixels, Target
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.classes import class_folders
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.masks import check_shape, decode_mask, resize_mask

KEPT_BYTES = 1 << 30  # of decoded images and masks that a reader keeps in memory; what is beyond is read again


def split_by_key(
    keys: Sequence[str], labels: Sequence[str | None], test_share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Rows to draw labelled images from, and rows held out; each class is split alike and stands on both sides.

    A row's side depends on the seed and the keys of its class only, not on their order. The one image of a class is
    not held out.
    """
    train: list[int] = []
    test: list[int] = []
    for label in dict.fromkeys(labels):
        rows = [row for row, own in enumerate(labels) if own == label]
        rows.sort(key=lambda row: blake3(f"{seed}/split/{keys[row]}".encode()).digest())
        cut = min(max(round(test_share * len(rows)), 1), len(rows) - 1)
        test += rows[:cut]
        train += rows[cut:]
    return sorted(train), sorted(test)


class LabelledReader:
    """The samples of one source, with masks where there is a folder of them; each is read when it is asked for."""

    def __init__(
        self, images: str, masks: str | None, recipe: TransformRecipe, ignore_value: int | None = IGNORE_VALUE
    ) -> None:
        self.images, self.masks, self.recipe, self.ignore_value = images, masks, recipe, ignore_value
        self._source = open_source(images)
        self.items = self._source.list()
        self._mask_source = open_source(masks) if masks else None
        self._mask_items = _by_stem(self._mask_source.list()) if self._mask_source else {}
        self._image_px: dict[int, tuple[int, int]] = {}
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
        if self._mask_source is None:
            classes = classes or self.class_folders(note)
        digests = self._digests(rows, note)
        good = list(digests)
        keys = [self.items[row].key for row in good]
        kind: type[Target]
        target: Callable[[int], Target]
        if self._mask_source is not None:
            occurring = frozenset(number for row in good for number in self.mask(row).occurring)
            table = ClassTable.numbered(1 + max(occurring, default=0))
            kind, target = Mask, lambda idx: self.mask(good[idx])
        else:
            assert classes is not None
            table = classes
            numbers = [table.number(self.items[row].label, key) for row, key in zip(good, keys, strict=True)]
            occurring = frozenset(numbers)
            kind, target = Class, lambda idx: Class(numbers[idx])
        own_keys = tuple(prefix + key for key in keys)
        pixels = tuple(digests.values())
        return LabelledSet(own_keys, kind, table, lambda idx: self.image(good[idx]), target, pixels, occurring)

    def class_folders(self, note: Note) -> ClassTable:
        """The classes of all samples of the listing. Raises: ConfigError where there are none, or they say nothing."""
        return class_folders(self.images, self.items, note)

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
            whole = decode_image(self._source.read(self.items[row].uri), SourceConfig().max_pixels)
            self._image_px[row] = (whole.shape[0], whole.shape[1])
            return resize_image(whole, self.recipe)

        return self._keep(("image", row), read)

    def mask(self, row: int) -> Mask:
        """Its mask, resized as the image is. Raises: InputError when there is none that fits."""
        source, item = self._mask_source, self._mask_item(self.items[row].key)
        assert source is not None
        if row not in self._image_px:
            self.image(row)

        def read() -> Pixels:
            try:
                whole = decode_mask(source.read(item.uri), item.key)
            except BadImage as err:
                raise InputError(f"{self.masks}: mask {item.key} cannot be read: {err.reason}; put it there") from err
            check_shape(whole, self._image_px[row], item.key)
            return resize_mask(whole, self.recipe)

        return Mask(self._keep(("mask", row), read), self.ignore_value)

    def _mask_item(self, key: str) -> SourceItem:
        items = self._mask_items.get(_stem(key), [])
        if not items:
            seen = next(iter(self._mask_items.values()))[0].key
            raise InputError(
                f"{self.masks}: no mask for image {key}; masks have the images' paths, here {_stem(key)}.png; "
                f"{seen} is one that is there"
            )
        if len(items) > 1:
            names = " and ".join(item.key for item in items)
            raise InputError(f"{self.masks}: image {key} has the masks {names}; leave one of them")
        return items[0]

    def _keep(self, name: tuple[str, int], read: Callable[[], Pixels]) -> Pixels:
        if name in self._kept:
            return self._kept[name]
        pixels = read()
        if pixels.nbytes <= self._free_bytes:
            self._kept[name] = pixels
            self._free_bytes -= pixels.nbytes
        return pixels


def _by_stem(items: Sequence[SourceItem]) -> dict[str, list[SourceItem]]:
    by_stem: dict[str, list[SourceItem]] = {}
    for item in items:
        by_stem.setdefault(_stem(item.key), []).append(item)
    return by_stem


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))
