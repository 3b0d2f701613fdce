"""What a layout of labelled data declares: where images and labels lie under a root, and how a target is read.

A layout lists images as sources do and hands out bytes, so that folders, archives and object storage all work. A new
one is a file with `LAYOUT`, and a line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dtpipe.extract.sources.base import SourceItem
from dtpipe.manifests.labels import ClassTable, Target


class LabelledSource(Protocol):
    """Images of one split with one target each, all of one kind. What was listed is in memory; nothing is decoded.

    Workers get a copy by pickling, and read from many threads.
    """

    @property
    def kind(self) -> type[Target]: ...

    @property
    def classes(self) -> ClassTable:
        """Empty for masks whose classes nobody has named: they are counted by who reads them."""
        ...

    @property
    def items(self) -> Sequence[SourceItem]:
        """The images, by key."""
        ...

    def read(self, row: int) -> bytes:
        """Bytes of an image. Raises: as `Source.read`."""
        ...

    def target(self, row: int, image_px: tuple[int, int]) -> Target:
        """What is known of an image of this height and width, which is turned as its orientation tag says.

        A mask may have another scale of the same aspect; a class needs no size.

        Raises: InputError naming the label that is missing, unreadable, of another size or of an unknown class.
        """
        ...

    def notes(self) -> Sequence[str]:
        """What was left out, and why, in sentences: labels without an image, images without a label."""
        ...


@dataclass(frozen=True)
class Layout:
    """One arrangement of labelled data, as published or as people keep it."""

    name: str
    """The word before the colon in `NAME:ROOT@SPLIT`."""
    reads: str
    """One sentence for `dtpipe list layouts`."""
    kind: type[Target]
    open: Callable[[str, str | None], LabelledSource]
    """The split of a root (path or URL).

    Raises: InputError saying what was looked for, where, and what lies there; ConfigError for a split there is none of.
    """
    open_ignoring: Callable[[str, str | None, int | None], LabelledSource] | None = None
    """As `open`, with the mask value that means 'no label', or None; where the data themselves do not say which."""
    splits: tuple[str, ...] = ()
    """As published, to be named in messages; empty where any folder or file may be one."""
    split_is_file: bool = False
    """True where the split is a file below the root, or an absolute path or URL; it may have slashes."""
    cleans_specks: bool = False
    """True where whoever published the masks ignores, in those to learn from, classes of a few pixels."""
