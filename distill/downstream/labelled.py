"""Labelled images that are read when a task asks for them, and the draw of a few of them.

Nothing here holds pixels: a set says how many images there are, their keys and what their classes mean; `image` and
`target` read one of them, from many threads. What a task needs at once it asks for by rows. A set pickles when what
reads it does, so that workers read too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Panoptic, Target, mask_classes
from dtpipe.manifests.words import are, count_of

IGNORE = -1
"""Value in tensors of pixels and cells that no classifier learns from and no score counts."""

SampleRows = Sequence[int] | npt.NDArray[np.int64]

_MISSING: dict[type[Target], str] = {
    Class: "this task needs class labels and the labelled images have none; give a source with class folders",
    Mask: "this task needs masks and the labelled images have none; give a folder of masks beside the images",
    Instances: "this task needs objects and the labelled images have none; give a layout of objects, such as coco-json",
    Panoptic: "this task needs segments and the labelled images have none; give a panoptic layout",
}


@dataclass(frozen=True)
class LabelledSet:
    """Images with one target each, all of one kind. Raises: ConfigError when keys repeat."""

    keys: tuple[str, ...]
    kind: type[Target]
    """What the targets are."""
    classes: ClassTable
    image: Callable[[int], npt.NDArray[np.uint8]]
    """Reads the image at a row: (H, W, 3) uint8."""
    target: Callable[[int], Target]
    """Reads its target; a mask has the image's height and width."""
    digests: tuple[str, ...] = ()
    """blake3 of each image's pixels, by which it is known under any key; none where nobody computed them."""
    target_digests: tuple[str, ...] = ()
    """`target_digest` of what was known of each image before anything was merged; none where nobody computed them."""
    occurring: frozenset[int] | None = None
    """Class numbers that occur among the targets; None where nobody has looked."""
    stamp: Callable[[int], str] | None = None
    """What tells the image at a row from one that was changed, without reading it; None where nothing does."""

    def __post_init__(self) -> None:
        if len(set(self.keys)) != len(self.keys):
            raise ConfigError("a key occurs twice among the labelled images; keys must be unique")

    def __len__(self) -> int:
        return len(self.keys)

    def subset(self, rows: SampleRows) -> LabelledSet:
        """The samples at `rows`, in that order."""
        places = [int(row) for row in rows]
        return replace(
            self,
            keys=tuple(self.keys[row] for row in places),
            image=_AtRows(self.image, tuple(places)),
            target=_AtRows(self.target, tuple(places)),
            digests=tuple(self.digests[row] for row in places) if self.digests else (),
            target_digests=tuple(self.target_digests[row] for row in places) if self.target_digests else (),
            occurring=None,
            stamp=None if self.stamp is None else _AtRows(self.stamp, tuple(places)),
        )

    def content_digest(self) -> str:
        """blake3 of keys, images, targets and classes, as far as they were looked at: what is trained or scored on.

        Classes of images are always looked at.
        """
        table = self.classes
        classes = [self.kind.__name__, *table.names, repr(sorted(table.things)), repr(sorted(table.numbers.items()))]
        targets = self.target_digests
        if self.kind is Class and not targets:  # which cost nothing to read
            targets = tuple(map(str, self.read_classes().tolist()))
        parts = (self.keys, self.digests, targets, classes)
        return blake3("\0\0".join("\0".join(part) for part in parts).encode("utf-8", "surrogatepass")).hexdigest()

    def foreground(self) -> LabelledSet:
        """The same samples with masks of two classes: background, anything else. Raises: ConfigError without masks."""
        self.need(Mask)
        return replace(
            self,
            classes=ClassTable(("background", "foreground")),
            target=_Changed(self.target, Mask.foreground),
            occurring=None if self.occurring is None else frozenset(min(number, 1) for number in self.occurring),
        )

    def as_masks(self) -> LabelledSet:
        """The same samples with masks; of objects, those of `Instances.as_mask`, whose class 0 is background.

        Raises: ConfigError when they have neither.
        """
        if self.kind is not Instances:
            self.need(Mask)
            return self
        return replace(
            self,
            kind=Mask,
            classes=mask_classes(self.classes),
            target=_Changed(self.target, Instances.as_mask),
            occurring=None,
        )

    def changed(self, change: Callable[[Any], Target]) -> LabelledSet:
        """The same samples, each target as a function of it gives it; of the same kind and classes."""
        return replace(self, target=_Changed(self.target, change), occurring=None)

    def find_classes(self) -> frozenset[int]:
        """Class numbers that occur among the targets; reads them all where nobody has looked."""
        if self.occurring is not None:
            return self.occurring
        return frozenset(number for row in range(len(self)) for number in self.target(row).occurring)

    def find_some_classes(self, num: int) -> frozenset[int]:
        """Class numbers that occur; where nobody has looked, no further than until there are `num` of them."""
        if self.occurring is not None:
            return self.occurring
        numbers: set[int] = set()
        for row in range(len(self)):
            if len(numbers) >= num:
                break
            numbers |= self.target(row).occurring
        return frozenset(numbers)

    def need(self, kind: type[Target]) -> None:
        """Raises: ConfigError saying what is missing when the targets are of another kind."""
        if self.kind is not kind:
            raise ConfigError(_MISSING[kind])

    def read_images(self, rows: SampleRows) -> Tensor:
        """Shapes: -> (n, H, W, 3) uint8. Raises: ShapeError naming an image of another shape or type."""
        return torch.from_numpy(self._stack(rows, self.image, "image"))

    def read_classes(self, rows: SampleRows | None = None) -> npt.NDArray[np.int64]:
        """Class numbers of all images, or of some. Shapes: -> (n,). Raises: ConfigError when they have none."""
        self.need(Class)
        rows = range(len(self)) if rows is None else rows
        return np.asarray([cast(Class, self.target(int(row))).number for row in rows], dtype=np.int64)

    def read_masks(self, rows: SampleRows) -> Tensor:
        """Class of each pixel, `IGNORE` where none counts. Shapes: -> (n, H, W) int64.

        Raises: ConfigError when the images have no masks; ShapeError naming a mask of another size.
        """
        self.need(Mask)

        def numbers(row: int) -> npt.NDArray[np.int64]:
            mask = cast(Mask, self.target(row))
            return np.where(mask.known, mask.numbers.astype(np.int64), IGNORE)

        return torch.from_numpy(self._stack(rows, numbers, "mask"))

    def _stack(self, rows: SampleRows, read: Callable[[int], npt.NDArray[Any]], what: str) -> npt.NDArray[Any]:
        arrays = [read(int(row)) for row in rows]
        for row, array in zip(rows, arrays, strict=True):
            if array.shape != arrays[0].shape or (what == "image" and not _is_image(array)):
                raise ShapeError(
                    f"{what} {self.keys[row]} is {array.shape} {array.dtype}, the first is {arrays[0].shape}; "
                    "images must be (H, W, 3) uint8, masks of their height and width, all of one size"
                )
        return np.stack(arrays)


@dataclass(frozen=True)
class _AtRows:
    """Reads the rows of a larger set by their numbers in a smaller one."""

    read: Callable[[int], Any]
    rows: tuple[int, ...]

    def __call__(self, row: int) -> Any:
        return self.read(self.rows[row])


@dataclass(frozen=True)
class _Changed:
    """Reads what another reads, and changes it."""

    read: Callable[[int], Any]
    change: Callable[[Any], Target]

    def __call__(self, row: int) -> Target:
        return self.change(self.read(row))


@dataclass(frozen=True)
class _OneAfterAnother:
    """Reads the rows of one set, and those of another after them."""

    first: Callable[[int], Any]
    num: int
    second: Callable[[int], Any]

    def __call__(self, row: int) -> Any:
        return self.first(row) if row < self.num else self.second(row - self.num)


def join_sets(first: LabelledSet, second: LabelledSet) -> LabelledSet:
    """The samples of two sets with targets of one kind and one table of classes. Raises: ConfigError for equal keys."""
    num, whole = len(first), bool(first.digests and second.digests)
    targets = bool(first.target_digests and second.target_digests)
    return replace(
        first,
        keys=(*first.keys, *second.keys),
        image=_OneAfterAnother(first.image, num, second.image),
        target=_OneAfterAnother(first.target, num, second.target),
        digests=(*first.digests, *second.digests) if whole else (),
        target_digests=(*first.target_digests, *second.target_digests) if targets else (),
        occurring=None,
        stamp=_OneAfterAnother(first.stamp, num, second.stamp) if first.stamp and second.stamp else None,
    )


def _is_image(array: npt.NDArray[Any]) -> bool:
    return array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8


def count_classes(*sets: LabelledSet) -> int:
    """How many classes the sets have: of images, one more than the largest; of masks, the length of their tables."""
    if sets[0].kind is Class:
        return max(int(labelled.read_classes().max()) for labelled in sets) + 1
    return max(len(labelled.classes) for labelled in sets)


def share_classes(train: LabelledSet, test: LabelledSet) -> tuple[LabelledSet, LabelledSet]:
    """Both with the longer table: of classes that nobody has named, either may hold more."""
    table = max((train.classes, test.classes), key=len)
    return replace(train, classes=table), replace(test, classes=table)


def check_several_classes(train: LabelledSet, test: LabelledSet) -> None:
    """Refuse classes or masks of a single class, which a constant answer scores 1.0 on, and sets without any object.

    Raises: ConfigError.
    """
    for part, labelled in (("labelled", train), ("held-out", test)):
        if labelled.kind not in (Class, Mask):
            if not labelled.find_some_classes(1):
                raise ConfigError(f"no {part} image holds an object or segment that counts; give images with some")
            continue
        numbers = labelled.find_some_classes(2)
        if len(numbers) < 2:
            what = "images are" if labelled.kind is Class else "masks hold pixels"
            names = [labelled.classes.names[number] for number in numbers]
            found = f"all {part} {what} of one class, {names[0]!r}" if names else f"no pixel of the {part} masks counts"
            raise ConfigError(f"{found}: a constant answer would score 1.0; give a second class")


def check_apart(train: LabelledSet, test: LabelledSet) -> None:
    """Refuse a test set that shares keys with the labelled ones. Raises: ConfigError naming one of them."""
    shared = sorted(set(train.keys) & set(test.keys))
    if shared:
        raise ConfigError(
            f"{count_of(len(shared), 'image')} {are(len(shared))} both labelled for training and held out, "
            f"{shared[0]!r} for one; split by key"
        )


@dataclass(frozen=True)
class Draw:
    """The labelled images of one seed: rows of the training set."""

    seed: int
    rows: npt.NDArray[np.int64]
    keep: Path | None = None
    """Folder for what is predicted from this draw, where a page will show it."""


def draw_labelled(labelled: LabelledSet, num: int | None, seed: int) -> npt.NDArray[np.int64]:
    """SampleRows of `num` images drawn by `seed`; all of them, in order of their keys, when `num` is None.

    The draw depends on the keys and the seed, not on the order of the set, and a smaller draw is the start of a larger
    one. Classes of images are taken in turn, so that their counts differ by at most one while every class lasts.

    Raises: ConfigError when there are fewer images, or fewer draws than classes.
    """
    by_key = np.argsort(np.asarray(labelled.keys))
    if num is None:
        return by_key
    if not 1 <= num <= len(labelled):
        raise ConfigError(
            f"{count_of(num, 'labelled image')} {are(num)} asked for and there {are(len(labelled))} {len(labelled)}; "
            f"ask for 1 to {len(labelled)}"
        )
    generator = np.random.Generator(np.random.Philox(seed))
    order = by_key[generator.permutation(len(by_key))]
    if labelled.kind is not Class:
        return order[:num]
    classes = labelled.read_classes()
    num_classes = len(np.unique(classes))
    if num < num_classes:
        raise ConfigError(
            f"{count_of(num, 'labelled image')} cannot cover {count_of(num_classes, 'class', 'classes')}; "
            f"ask for {num_classes} or more: "
            "the number counts the images of all classes together"
        )
    turn = _turn_within_class(classes[order])
    return order[np.argsort(turn, kind="stable")][:num]


def _turn_within_class(classes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each sample, how many of its class stand before it."""
    turn = np.zeros(len(classes), dtype=np.int64)
    for number in np.unique(classes):
        rows = np.flatnonzero(classes == number)
        turn[rows] = np.arange(len(rows))
    return turn
