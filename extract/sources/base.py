"""What a source of images is.

A source lists samples and hands out the bytes of one; it does not decode. Keys are content of the dataset, URIs are
not: the same images listed elsewhere give the same keys. A kind of source declares itself as `KIND` in its file, and
`registry` collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dtpipe.manifests.schema import Order

if TYPE_CHECKING:
    from dtpipe.extract.sources.places import Place


@dataclass(frozen=True)
class SourceItem:
    """One sample: its stable key (NFC), where its bytes are, and its label if the source knows one."""

    key: str
    uri: str
    label: str | None = None


class Source(Protocol):
    """Samples under one URL. Opening is cheap and reads no listing; workers open a source only to read."""

    @property
    def kind(self) -> str:
        """Registered kind; content of the recipe."""
        ...

    def list(self) -> Sequence[SourceItem]:
        """All samples: in the container's order where it has one (tar, Parquet), else sorted by key.

        Raises: InputError when there is none, or the source cannot be listed.
        """
        ...

    def ignored(self) -> Mapping[str, int]:
        """What lies in the source and is not used: extension (or `hidden`, `special`) to count. May list."""
        ...

    def read(self, uri: str) -> bytes:
        """Bytes of one sample; may be called from many threads.

        Raises: BadImage when this sample cannot be read whatever one does; InputError when trying again may help.
        """
        ...


@dataclass(frozen=True)
class Container:
    """Files that hold images and may lie in a folder, beside others."""

    ending: str
    """How their names end, in lower case."""
    example: Callable[[Place, str], str | None]
    """The name of an image in the file of a place and path, or None; looks at a bounded part. Raises: InputError."""
    fills_folders: bool = True
    """A folder of such files is a source too."""


@dataclass(frozen=True)
class SourceKind:
    """One kind of source, declared in its file."""

    kind: str
    reads: str
    """One sentence for `dtpipe list sources`: what it reads."""
    open: Callable[[str], Source]
    recognise: Callable[[str], Source | None]
    """The source at a URL of unknown kind, or None. Cheap except for folders: looks at the name, opens no listing."""
    order: Order = "permuted"
    """Order of rows unless `extract.source.order` names one; containers that are read in runs keep their own."""
    container: Container | None = None
    """Such files in a folder: `choice` looks into them where there are others."""
