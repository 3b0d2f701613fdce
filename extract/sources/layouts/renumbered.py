"""Held-out images whose classes have the numbers of the images to learn from: their tables may differ, names count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.mask_files import check_classes
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Target


def with_classes_of(source: LabelledSource, table: ClassTable) -> LabelledSource:
    """A source by the numbers of another table; targets of classes that it has not raise InputError when read."""
    return source if source.classes.names == table.names else Renumbered(source, table)


@dataclass(frozen=True, eq=False)
class Renumbered:
    """A labelled source by the class numbers of another table."""

    source: LabelledSource
    classes: ClassTable

    @property
    def kind(self) -> type[Target]:
        """Of the source."""
        return self.source.kind

    @property
    def items(self) -> Sequence[SourceItem]:
        """Of the source."""
        return self.source.items

    def read(self, row: int) -> bytes:
        """As the source."""
        return self.source.read(row)

    def target(self, row: int, image_px: tuple[int, int]) -> Target:
        """As the source, by name. Raises: InputError also for a class that the table has not."""
        target, key, names = self.source.target(row, image_px), self.items[row].key, self.source.classes.names
        if not names:  # masks whose classes only the other source names
            assert isinstance(target, Mask)
            check_classes(target, self.classes, key)
            return target
        for number in sorted(target.occurring):
            self.classes.number(names[number], key)
        own = {name: number for number, name in enumerate(self.classes.names)}
        return _renumber(target, np.array([own.get(name, 0) for name in names]))

    def notes(self) -> Sequence[str]:
        """Of the source."""
        return self.source.notes()


def _renumber(target: Target, numbers: NDArray[np.integer[Any]]) -> Target:
    """`numbers[i]` is the new number of class i; of one that does not occur it may be any."""
    if isinstance(target, Class):
        return Class(int(numbers[target.number]))
    if isinstance(target, Instances):
        return replace(target, classes=numbers[target.classes].astype(np.int64))
    if isinstance(target, Mask):
        renumbered, known = target.numbers.astype(np.int64), target.known
        renumbered[known] = numbers[renumbered[known]]
        return _with_ignored(target, renumbered, known)
    return replace(target, classes={segment: int(numbers[number]) for segment, number in target.classes.items()})


def _with_ignored(mask: Mask, renumbered: NDArray[np.int64], known: NDArray[np.bool_]) -> Mask:
    """The value that was ignored may be a class now."""
    renumbered[~known] = -1
    return Mask(renumbered, None if mask.ignore is None else -1)
