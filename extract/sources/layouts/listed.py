"""Labelled images of any layout: what was listed, who reads the images, and who reads the targets.

A layout lists, checks what can be checked without decoding, and gives `ListedSource` a small reader of its targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dtpipe.extract.sources.base import Source, SourceItem
from dtpipe.manifests.labels import ClassTable, Target


class ReadsUris(Protocol):
    """Whatever hands out the bytes of a file that it has listed: a `Tree`, or a `Reopened` source.

    It is asked from many threads, and pickles.
    """

    def read(self, uri: str) -> bytes:
        """Raises: BadImage when this file cannot be read whatever one does; InputError when trying again may help."""
        ...


class Reopened:
    """A source that a copy made by pickling opens anew; `open_it` pickles and is cheap."""

    def __init__(self, open_it: Callable[[], Source]) -> None:
        self._open_it = open_it
        self._source: Source | None = None

    def __reduce__(self) -> tuple[type[Reopened], tuple[Callable[[], Source]]]:
        return Reopened, (self._open_it,)

    def read(self, uri: str) -> bytes:
        """As the source."""
        if self._source is None:
            self._source = self._open_it()
        return self._source.read(uri)


@dataclass(frozen=True, eq=False)
class ListedSource:
    """A `LabelledSource` of parts, each of which pickles."""

    kind: type[Target]
    classes: ClassTable
    items: Sequence[SourceItem]
    images: ReadsUris
    targets: Callable[[int, tuple[int, int]], Target]
    """What `target` answers."""
    said: Sequence[str] = ()
    """What `notes` answers."""

    def read(self, row: int) -> bytes:
        """Bytes of an image. Raises: as `Source.read`."""
        return self.images.read(self.items[row].uri)

    def target(self, row: int, image_px: tuple[int, int]) -> Target:
        """As the protocol says."""
        return self.targets(row, image_px)

    def notes(self) -> Sequence[str]:
        """What was left out, and why."""
        return self.said
