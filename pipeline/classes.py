"""What the classes of labelled images are, and what is said when they cannot be told apart or are no classes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from dtpipe.distill.downstream.labelled import LabelledSet, check_several_classes
from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.names import is_hidden, key_of
from dtpipe.extract.sources.places import open_place
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable, Mask, class_table
from dtpipe.pipeline.cli.console import Note

_LABELLED_PARTS = ("train", "training", "trainval")
_HELD_OUT_PARTS = ("val", "valid", "validation", "test", "testing", "eval", "dev")
_PARTS = {*_LABELLED_PARTS, *_HELD_OUT_PARTS, "unlabeled", "unlabelled", "images", "labels", "masks", "annotations"}
"""Names of folders that data sets divide themselves into, in lower case; one class may bear such a name, not all."""
_SHOWN = 5  # names in a sentence


def class_folders(url: str, items: Sequence[SourceItem], note: Note) -> ClassTable:
    """The classes of a source's samples; folders that hold no image are named in a note.

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
            advice = f"give --images {_inside(url, labelled[0])} --test-images {_inside(url, held_out[0])}"
        raise ConfigError(f"{url}: {', '.join(parts)} are parts of a data set, not classes; {advice}")
    if empty := sorted(_folders(url, items) - set(names)):
        note(f"left out folders without an image: {_few(empty)}")
    return table


def check_scorable(train: LabelledSet, test: LabelledSet, ignore_value: int | None) -> None:
    """Refuse sets that any constant answer scores well on, and say so of masks whose classes are all ignored.

    Raises: ConfigError.
    """
    try:
        check_several_classes(train, test)
    except ConfigError as err:
        if train.kind is Mask and _holds_ignored((train, test)):
            raise ConfigError(
                f"{err}, or if the value {ignore_value}, which means 'no label' here, is one: "
                "--foreground --ignore-value null"
            ) from err
        raise


def coverage_notes(train: LabelledSet, test: LabelledSet) -> list[str]:
    """What to say of classes that stand on one side only."""
    what, learned, scored = "image" if train.kind is not Mask else "mask", train.find_classes(), test.find_classes()
    notes = []
    if unknown := _names((train, test), scored - learned):
        notes.append(f"no labelled {what} holds {unknown}: nobody can find that, and it counts as missed")
    if unseen := _names((train, test), learned - scored):
        notes.append(f"no held-out {what} holds {unseen}: the scores say nothing of that")
    return notes


def _few(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


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
    return f" {_inside(url, first)}, which holds {_few(sorted({part[1] for part in parts}))}"


def _parts(names: Collection[str]) -> list[str]:
    """The names that are parts of a data set, where all are, or where labelled and held-out ones stand side by side."""
    parts = [name for name in names if name.lower() in _PARTS]
    lower = {part.lower() for part in parts}
    both = lower & set(_LABELLED_PARTS) and lower & set(_HELD_OUT_PARTS)
    return parts if both or len(parts) == len(names) else []


def _folders(url: str, items: Sequence[SourceItem]) -> set[str]:
    """Names of the folders right below a local folder whose samples lie in class folders; a store has no empty ones."""
    place = open_place(url)
    if not (place.is_local and place.is_folder) or any(item.key.split("/")[0] != item.label for item in items):
        return set()
    return {key_of(path.name) for path in Path(place.path).iterdir() if path.is_dir() and not is_hidden(path.name)}


def _inside(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _names(sets: Sequence[LabelledSet], numbers: Collection[int]) -> str:
    names = max((labelled.classes.names for labelled in sets), key=len)
    return _few([names[number] for number in sorted(numbers)])


def _holds_ignored(sets: Sequence[LabelledSet]) -> bool:
    masks = (labelled.target(row) for labelled in sets for row in range(len(labelled)))
    return any(isinstance(mask, Mask) and not mask.known.all() for mask in masks)
