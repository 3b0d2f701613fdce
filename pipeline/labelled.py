"""From any labelled source to a `LabelledSet`: resized for frozen tasks, whole for tuned ones.

Whole images and targets are read when a worker asks for them. Everything is looked at once before any work, as long as
there are no more than `LOOKED_AT` images, so that what is wrong with one is said at the beginning.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from blake3 import blake3

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.extract.sources.images import MAX_PIXELS, decode_image, resize_image
from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.generic.folders import open_folders
from dtpipe.extract.sources.layouts.generic.masks import open_masks_beside
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.extract.sources.layouts.resized import resize_target
from dtpipe.extract.sources.places import file_stamp, spread
from dtpipe.manifests.errors import BadImage, ConfigError, InputError
from dtpipe.manifests.labels import (
    IGNORE_VALUE,
    Class,
    ClassTable,
    Instances,
    Mask,
    Pixels,
    Target,
    mask_classes,
    target_digest,
)
from dtpipe.manifests.phases import counted
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.cli.console import Note

KEPT_BYTES = 1 << 30  # of decoded images and masks that a reader keeps in memory; what is beyond is read again
LOOKED_AT = 20_000  # images that are all read before any work; of more, `_FEW`
_FEW = 200
_AT_ONCE = 8  # threads that look
_Kept = TypeVar("_Kept", Pixels, Mask)


def open_labelled(
    images: str, masks: str | None = None, ignore_value: int | None = IGNORE_VALUE, class_names: str | None = None
) -> LabelledSource:
    """The labelled images that `NAME:ROOT@SPLIT` names, or a URL of class folders, or one with masks beside it.

    Raises: as `Layout.open`.
    """
    if masks is not None:
        return open_masks_beside(images, masks, ignore_value, class_names)
    return open_layout(images, ignore_value) or open_folders(images)


class LabelledReader:
    """The samples of one labelled source as a task takes them. Safe to use from many threads; pickles."""

    def __init__(
        self,
        source: LabelledSource,
        recipe: TransformRecipe | None,
        where: str = "",
        as_masks: bool = False,
        kept_bytes: int | None = None,
    ) -> None:
        """With a recipe, images and targets come at its size, else whole; `as_masks` makes masks of objects."""
        self.source, self.recipe, self.where = source, recipe, where
        self.items = source.items
        self.kind: type[Target] = Mask if as_masks and source.kind is Instances else source.kind
        self._image_px: dict[int, tuple[int, int]] = {}
        self._kept = _Memory(KEPT_BYTES if kept_bytes is None else kept_bytes)

    def __reduce__(self) -> tuple[type[LabelledReader], tuple[LabelledSource, TransformRecipe | None, str, bool, int]]:
        return LabelledReader, (self.source, self.recipe, self.where, self.kind is Mask, 0)

    def select(self, rows: Sequence[int], note: Note, prefix: str = "") -> LabelledSet:
        """The samples at `rows` of the source, `prefix` before their keys; bad images are named and left out.

        Raises: InputError when a target cannot be used, or no image is good.
        """
        seen = self._look(rows, note)
        good = [row for row in rows if seen.get(row, _UNSEEN) is not None]
        if not good:
            raise InputError(f"{self.where}: no image can be used; see the notes above")
        entries = [entry for row in good if (entry := seen.get(row)) is not None]
        all_seen = len(entries) == len(good)
        occurring = frozenset(number for entry in entries for number in entry.occurring)
        keys = tuple(prefix + item.key for item in self.items)
        labelled = LabelledSet(keys, self.kind, self._classes(occurring, all_seen), self.image, self.target)
        return replace(
            replace(labelled, stamp=self._stamp).subset(good),
            digests=tuple(entry.digest for entry in entries) if all_seen else (),
            target_digests=tuple(entry.target_digest for entry in entries) if all_seen else (),
            occurring=occurring if all_seen else None,
        )

    def image(self, row: int) -> Pixels:
        """An image of the source, whole or at its size. Shapes: -> (H, W, 3) uint8. Raises: InputError naming it."""
        try:
            return self._image(row)
        except BadImage as err:
            raise InputError(
                f"{self.items[row].key}: {err.reason}; put it there again, or take it away and run again"
            ) from err

    def target(self, row: int) -> Target:
        """Its target, which lies on the image as `image` gives it. Raises: InputError when there is none that fits."""
        if self.source.kind is Class:
            return self.source.target(row, (0, 0))
        if self.kind is not Mask:
            return self._whole_or_resized(self.source.target(row, self._size(row)), row)
        return self._kept.get(("mask", row), lambda: self._mask(row))

    def _stamp(self, row: int) -> str:
        """Of the file, and the size at which it is taken."""
        uri = self.items[row].uri
        return f"{uri}\0{file_stamp(uri)}\0{'' if self.recipe is None else self.recipe.model_dump_json()}"

    def _image(self, row: int) -> Pixels:
        def read() -> Pixels:
            whole = decode_image(self.source.read(row), MAX_PIXELS)
            self._image_px[row] = (whole.shape[0], whole.shape[1])
            return whole if self.recipe is None else resize_image(whole, self.recipe)

        return self._kept.get(("image", row), read)

    def _size(self, row: int) -> tuple[int, int]:
        """Height and width of the whole image."""
        if row not in self._image_px:
            self.image(row)
        return self._image_px[row]

    def _mask(self, row: int) -> Mask:
        target = self.source.target(row, self._size(row))
        mask = self._whole_or_resized(target.as_mask() if isinstance(target, Instances) else target, row)
        assert isinstance(mask, Mask)
        return mask

    def _whole_or_resized(self, target: Target, row: int) -> Target:
        if self.recipe is not None:
            return resize_target(target, self.recipe)
        size = self._size(row)
        if isinstance(target, Mask) and target.numbers.shape != size:
            return resize_target(target, TransformRecipe(resize="stretch", height=size[0], width=size[1]))
        return target

    def _classes(self, occurring: frozenset[int], all_seen: bool) -> ClassTable:
        """The source's, counted where nobody has named them. Raises: ConfigError where they cannot be counted."""
        table = self.source.classes
        if not len(table):
            if not all_seen:
                raise ConfigError(
                    f"{self.where}: the classes of over {LOOKED_AT} masks must be named; give --class-names"
                )
            return ClassTable.numbered(1 + max(occurring, default=0))
        return table if self.kind is self.source.kind else mask_classes(table)

    def _look(self, rows: Sequence[int], note: Note) -> dict[int, _Seen | None]:
        """What is seen of rows, None for a bad image; of all of them, or of a few where there are many."""
        if len(rows) > LOOKED_AT:
            note(
                f"{self.where}: of {len(rows)} images {_FEW} are looked at first; the others are read when they are "
                "needed, and a run on them that goes on later compares their keys alone"
            )
            rows = spread(rows, _FEW)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            looked = counted(pool.map(self._see, rows), len(rows), "a look at images and labels")
            seen = dict(zip(rows, looked, strict=True))
        for row, entry in seen.items():
            if isinstance(entry, BadImage):
                note(f"left out {self.items[row].key}: {entry.reason}")
        return {row: None if isinstance(entry, BadImage) else entry for row, entry in seen.items()}

    def _see(self, row: int) -> _Seen | BadImage:
        try:
            digest = blake3(self._image(row).tobytes()).hexdigest()
        except BadImage as err:
            return err
        target = self.target(row)
        return _Seen(digest, target_digest(target), target.occurring)


@dataclass(frozen=True)
class _Seen:
    """What is kept of a sample that was looked at."""

    digest: str
    """blake3 of the image's pixels."""
    target_digest: str
    occurring: frozenset[int]


_UNSEEN = _Seen("", "", frozenset())


class _Memory:
    """What was read, up to a number of bytes; in the process that began it alone, so that workers add nothing."""

    def __init__(self, size_bytes: int) -> None:
        self._kept: dict[tuple[str, int], Any] = {}
        self._free_bytes, self._process, self._lock = size_bytes, os.getpid(), threading.Lock()

    def get(self, name: tuple[str, int], read: Callable[[], _Kept]) -> _Kept:
        """What was kept under a name, or what `read` gives."""
        if name in self._kept:
            kept: _Kept = self._kept[name]
            return kept
        fresh = read()
        num_bytes = fresh.numbers.nbytes if isinstance(fresh, Mask) else fresh.nbytes
        if os.getpid() == self._process:  # after a fork the lock may be held for ever
            with self._lock:
                if name not in self._kept and num_bytes <= self._free_bytes:
                    self._kept[name] = fresh
                    self._free_bytes -= num_bytes
        return fresh


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
