"""Labels as data: what the target of a labelled image is, and what the numbers in it mean.

A target is a record, and a task says which kind it learns from. Another kind is a class here, named in `Target`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError, InputError

Pixels = NDArray[np.uint8]
IGNORE_VALUE = 255  # what most published masks hold where nothing is known


@dataclass(frozen=True)
class ClassTable:
    """What class numbers mean: number i is `names[i]`. Raises: ConfigError when a name occurs twice."""

    names: tuple[str, ...]
    things: frozenset[int] = frozenset()
    """Numbers of countable classes, where targets are `Panoptic`; the others are stuff."""
    numbers: Mapping[int, int] = field(default_factory=dict)
    """The data set's own number of each class, where it has others, as in its result files: COCO's 90 for 79."""

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"a class name occurs twice among {', '.join(self.names)}; names must be unique")

    @classmethod
    def numbered(cls, num: int) -> ClassTable:
        """Classes that are known by their numbers alone."""
        return cls(tuple(map(str, range(num))))

    def __len__(self) -> int:
        return len(self.names)

    def number(self, name: str | None, key: str) -> int:
        """The number of the class that sample `key` has. Raises: InputError naming both when it is not in the table."""
        if name not in self.names:
            if name is None:
                raise InputError(f"{key}: has no class; it must be one of {', '.join(self.names)}")
            raise InputError(f"{key}: class {name!r} is not among the classes to learn from, {', '.join(self.names)}")
        return self.names.index(name)


@dataclass(frozen=True)
class Class:
    """One class for the whole image."""

    number: int

    @property
    def occurring(self) -> frozenset[int]:
        """The class alone."""
        return frozenset({self.number})


@dataclass(frozen=True, eq=False)
class Mask:
    """A class for every pixel, 0 for background."""

    numbers: NDArray[np.integer[Any]]
    """(H, W) class numbers."""
    ignore: int | None = IGNORE_VALUE
    """Value of the pixels that nothing is learned from and no score counts; None: all count."""

    @property
    def known(self) -> NDArray[np.bool_]:
        """Where a pixel counts. Shapes: (H, W)."""
        known: NDArray[np.bool_] = self.numbers != (-1 if self.ignore is None else self.ignore)
        return known

    @property
    def occurring(self) -> frozenset[int]:
        """Class numbers of the pixels that count."""
        return frozenset(np.unique(self.numbers[self.known]).tolist())

    def foreground(self) -> Mask:
        """The same pixels in two classes: 0 background, 1 anything else; ignored pixels stay ignored."""
        return Mask(np.where(self.known, self.numbers > 0, IGNORE_VALUE).astype(np.uint8))

    def without_specks(self, below_px: int = 20) -> Mask:
        """The same with every class of fewer than `below_px` pixels ignored: slips of the pen teach nothing.

        The label-efficient benchmark cleans its training masks so, at 256 px, and scores whole ones.

        Raises: ConfigError where no value is ignored.
        Source: `prepare_data` of yandex-research/ddpm-segmentation, train_interpreter.py.
        """
        if self.ignore is None:
            raise ConfigError("no value of these masks means 'no label', and small classes are to get it; name one")
        numbers, counts = np.unique(self.numbers[self.known], return_counts=True)
        specks = numbers[counts < below_px]
        return Mask(np.where(np.isin(self.numbers, specks), self.ignore, self.numbers), self.ignore)


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of an image; n may be 0. Classes count from 0, there is no background among them."""

    size_px: tuple[int, int]
    """Height and width of the image."""
    boxes: NDArray[np.float64]
    """(n, 4) left, top, right, bottom in px; the right and bottom edges are outside."""
    classes: NDArray[np.int64]
    """(n,) class numbers."""
    masks: NDArray[np.bool_] | None = None
    """(n, H, W); None where only boxes are known."""
    crowd: NDArray[np.bool_] | None = None
    """(n,) True for groups and regions that are neither learned from nor scored; None: none is."""
    areas: NDArray[np.float64] | None = None
    """(n,) px as the data set states them, by which scores by size go; None: those of masks, else of boxes."""

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def counts(self) -> NDArray[np.bool_]:
        """Which objects are learned from and scored. Shapes: (n,)."""
        return np.ones(len(self), dtype=bool) if self.crowd is None else ~self.crowd

    @property
    def occurring(self) -> frozenset[int]:
        """Class numbers of the objects that count."""
        return frozenset(np.unique(self.classes[self.counts]).tolist())

    def as_mask(self) -> Mask:
        """The same in semantic classes: 0 background, 1 + class number elsewhere; smaller objects lie on top.

        Where nothing but a crowd is, pixels are ignored. Raises: ConfigError for objects without masks.
        """
        if self.masks is None:
            raise ConfigError("these labels are boxes without masks, and a mask is to be learned from; use task detect")
        numbers = np.zeros(self.size_px, dtype=np.int64)
        if self.crowd is not None:
            numbers[self.masks[self.crowd].any(axis=0)] = -1
        counted = np.flatnonzero(self.counts)
        sizes = self.masks.sum(axis=(1, 2))
        for idx in counted[np.argsort(-sizes[counted], kind="stable")]:
            numbers[self.masks[idx]] = 1 + self.classes[idx]
        return Mask(numbers, ignore=-1)  # there may be more classes than 255


@dataclass(frozen=True, eq=False)
class Panoptic:
    """Every pixel's segment, and every segment's class."""

    segments: NDArray[np.int32]
    """(H, W) ids of segments; 0 where nothing is known."""
    classes: Mapping[int, int]
    """Segment id to class number; of stuff, one segment per class."""
    crowd: frozenset[int] = frozenset()
    """Ids of segments that are neither learned from nor scored."""

    @property
    def occurring(self) -> frozenset[int]:
        """Class numbers of the segments that count."""
        return frozenset(number for segment, number in self.classes.items() if segment not in self.crowd)


Target = Class | Mask | Instances | Panoptic
KIND_WORDS: Mapping[type[Target], str] = {Class: "classes", Mask: "masks", Instances: "objects", Panoptic: "segments"}
"""What each kind is called in sentences."""


def target_digest(target: Target) -> str:
    """blake3 of all that a target says, by which a label that was changed is known under its key."""
    digest = blake3(type(target).__name__.encode())
    for part in fields(target):
        value = getattr(target, part.name)
        if isinstance(value, np.ndarray):
            digest.update(f"{part.name}{value.shape}{value.dtype.str}".encode())
            digest.update(value.tobytes())
        else:
            plain = sorted(value.items()) if isinstance(value, Mapping) else value
            digest.update(repr((part.name, sorted(plain) if isinstance(plain, frozenset) else plain)).encode())
    return digest.hexdigest()


def mask_classes(objects: ClassTable) -> ClassTable:
    """The classes of masks that are made of objects: background, then those of the objects."""
    background = "background"
    while background in objects.names:
        background = f"other {background}"
    return ClassTable((background, *objects.names))


def class_table(labels: Iterable[str | None]) -> ClassTable | None:
    """The classes of labelled samples in the order of their names; None when some sample has no label."""
    names = set(labels)
    return None if None in names else ClassTable(tuple(sorted(map(str, names))))
