"""Labels as data: what the target of a labelled image is, and what the numbers in it mean.

A target is a record, and a task says which kind it learns from. Another kind is a class here, named in `Target`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError, InputError

IGNORE_VALUE = 255  # what most published masks hold where nothing is known


@dataclass(frozen=True)
class ClassTable:
    """What class numbers mean: number i is `names[i]`. Raises: ConfigError when a name occurs twice."""

    names: tuple[str, ...]

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


Target = Class | Mask


def class_table(labels: Iterable[str | None]) -> ClassTable | None:
    """The classes of labelled samples in the order of their names; None when some sample has no label."""
    names = set(labels)
    return None if None in names else ClassTable(tuple(sorted(map(str, names))))
