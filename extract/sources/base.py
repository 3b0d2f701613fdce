"""What a source of images is, and the registry that finds one by kind.

A source lists samples and hands out the bytes of one; it does not decode. Keys are content of the dataset, URIs are
not: the same images listed elsewhere give the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.schema import Order


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
        """What lies in the source and is no sample: file extension (or `hidden`, `special`) to count. Lists if need be."""
        ...

    def read(self, uri: str) -> bytes:
        """Bytes of one sample; may be called from many threads.

        Raises: BadImage when this sample cannot be read whatever one does; InputError when trying again may help.
        """
        ...


@dataclass(frozen=True)
class SourceKind:
    """One registered kind."""

    kind: str
    reads: str
    """One sentence for `dtpipe list sources`: what it reads."""
    open: Callable[[str], Source]
    recognise: Callable[[str], Source | None]
    """The source at a URL of unknown kind, or None. Cheap: looks at the name and at what lies right below it."""
    order: Order = "permuted"
    """Order of rows unless `extract.source.order` names one: containers that are read in runs keep their own."""
    asked_last: bool = False
    """True for folders, which take whatever the others do not; `recognise` may then list, and say what is wrong."""


_KINDS: dict[str, SourceKind] = {}


def register_source(kind: SourceKind) -> None:
    """Make a kind known; its file in `extract/sources/` calls this once."""
    _KINDS[kind.kind] = kind


def source_kinds() -> dict[str, SourceKind]:
    """All registered kinds by name."""
    from dtpipe.extract.sources import features, folder, lmdb, parquet, tar, zip  # noqa: F401  one name per file

    return dict(sorted(_KINDS.items(), key=lambda item: item[1].asked_last))


def open_source(url: str, kind: str = "auto") -> Source:
    """The source at `url`; with `auto` its kind follows from what the URL holds.

    Raises: ConfigError for an unknown kind; InputError when there is nothing of that kind at `url`.
    """
    kinds = source_kinds()
    if kind != "auto":
        if kind not in kinds:
            raise ConfigError(f"source kind {kind!r} is unknown; choose one of {sorted(kinds)}")
        return kinds[kind].open(url)
    for candidate in kinds.values():
        source = candidate.recognise(url)
        if source is not None:
            return source
    raise InputError(
        f"{url}: no source kind recognises this; `dtpipe list sources` says what each reads, or set extract.source.kind"
    )
