"""Class folders, or any source that labels its samples: a table, tars with labels, another tool's archive."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.base import Layout
from dtpipe.extract.sources.layouts.files import few
from dtpipe.extract.sources.layouts.listed import ListedSource, Reopened
from dtpipe.extract.sources.names import is_hidden, key_of
from dtpipe.extract.sources.places import open_place
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class, ClassTable, class_table

_LABELLED_PARTS = ("train", "training", "trainval")
_HELD_OUT_PARTS = ("val", "valid", "validation", "test", "testing", "eval", "dev")
_PARTS = {*_LABELLED_PARTS, *_HELD_OUT_PARTS, "unlabeled", "unlabelled", "images", "labels", "masks", "annotations"}
"""Names of folders that data sets divide themselves into, in lower case; one class may bear such a name, not all."""


def open_folders(root: str, split: str | None = None) -> ListedSource:
    """The labelled samples of a source. Raises: as `class_folders`; InputError as sources do."""
    url = f"{root.rstrip('/')}/{split}" if split else root
    source = open_source(url)
    items = source.list()
    table = class_folders(url, items)
    empty = empty_folders(url, items)
    notes = [f"left out folders without an image: {few(empty)}"] if empty else []
    images = Reopened(partial(open_source, url, source.kind))
    return ListedSource(Class, table, items, images, classes_of(items, table), notes)


@dataclass(frozen=True)
class ClassTargets:
    """The class of each row."""

    numbers: tuple[int, ...]

    def __call__(self, row: int, image_px: tuple[int, int]) -> Class:  # noqa: ARG002  a class has no size
        return Class(self.numbers[row])


def classes_of(items: Sequence[SourceItem], table: ClassTable) -> ClassTargets:
    """The classes that samples' labels name. Raises: InputError naming a sample whose label is not in the table."""
    numbers = {name: number for number, name in enumerate(table.names)}
    known = (numbers.get(item.label or "", -1) for item in items)
    return ClassTargets(
        tuple(table.number(item.label, item.key) if n < 0 else n for n, item in zip(known, items, strict=True))
    )


def class_folders(url: str, items: Sequence[SourceItem]) -> ClassTable:
    """The classes of a source's samples.

    Raises: ConfigError when some sample has no class, when there is one class only, or when the classes are parts of
    a data set (train, val; images, labels).
    """
    table = class_table(item.label for item in items)
    if table is None:
        raise ConfigError(f"{url}: {_unlabelled(items)}; give class folders or --masks, or there is nothing to score")
    names, above = table.names, f"give the folder right above the class folders with --images{_deeper(url, items)}"
    if len(names) == 1:
        raise ConfigError(
            f"{url}: all {len(items)} images are of one class, {names[0]!r}: a constant answer would score 1.0; "
            f"if the classes lie deeper, {above}"
        )
    if parts := _parts(names):
        labelled = [part for part in parts if part.lower() in _LABELLED_PARTS]
        held_out = [part for part in parts if part.lower() in _HELD_OUT_PARTS]
        advice = above
        if labelled and held_out:
            advice = f"give --images {_below(url, labelled[0])} --test-images {_below(url, held_out[0])}"
        raise ConfigError(f"{url}: {', '.join(parts)} are parts of a data set, not classes; {advice}")
    return table


def empty_folders(url: str, items: Sequence[SourceItem]) -> list[str]:
    """Names of class folders on a disk that hold no image; a store has no empty ones."""
    place = open_place(url)
    if not (place.is_local and place.is_folder) or any(item.key.split("/")[0] != item.label for item in items):
        return []
    folders = {key_of(path.name) for path in Path(place.path).iterdir() if path.is_dir() and not is_hidden(path.name)}
    return sorted(folders - {str(item.label) for item in items})


def _unlabelled(items: Sequence[SourceItem]) -> str:
    without = [item.key for item in items if item.label is None]
    outside = [key for key in without if "/" not in key]
    if len(without) < len(items):
        return f"{len(without)} of {len(items)} images have no label, {without[0]} for one"
    if 0 < len(outside) < len(items):
        return f"no class folders, since {len(outside)} of {len(items)} images lie in none, {outside[0]} for one"
    return "no class folders"


def _deeper(url: str, items: Sequence[SourceItem]) -> str:
    """The URL below which the next folders lie, of samples that all lie in one folder."""
    parts = [item.key.split("/") for item in items]
    first = parts[0][0]
    if len({part[0] for part in parts}) > 1 or min(map(len, parts)) < 3:
        return ""
    return f" {_below(url, first)}, which holds {few(sorted({part[1] for part in parts}))}"


def _parts(names: Collection[str]) -> list[str]:
    """The names that are parts of a data set, where all are, or where labelled and held-out ones stand side by side."""
    parts = [name for name in names if name.lower() in _PARTS]
    return parts if both_parts(names) or len(parts) == len(names) else []


def both_parts(names: Collection[str]) -> list[str]:
    """Names of labelled and of held-out parts of a data set, where there are both, labelled ones first."""
    labelled = [name for name in names if name.lower() in _LABELLED_PARTS]
    held_out = [name for name in names if name.lower() in _HELD_OUT_PARTS]
    return labelled + held_out if labelled and held_out else []


def _below(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


LAYOUT = Layout(
    "folders",
    "folders:ROOT@SPLIT: class folders in ROOT/SPLIT, or any source with labels there (tars, Parquet); @SPLIT may go.",
    Class,
    open_folders,
)
