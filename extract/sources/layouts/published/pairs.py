"""Images and their labels under one root, paired by name, with what is left over in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.files import Tree, few
from dtpipe.extract.sources.names import is_image, without_ending
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.words import count_of


@dataclass(frozen=True)
class Pairs:
    """Images that have a label, by key."""

    items: Sequence[SourceItem]
    labels: Sequence[tuple[str, str]]
    """Name below the root and URI of each image's label."""
    notes: tuple[str, ...]


def check_split(layout: str, root: str, split: str | None, splits: Sequence[str]) -> str:
    """The split that was named. Raises: ConfigError where none, or another one, was."""
    if split in splits:
        return str(split)
    named = "no split is named" if split is None else f"there is no split {split!r}"
    raise ConfigError(f"{layout}:{root}: {named}; write {' or '.join(f'{layout}:{root}@{own}' for own in splits)}")


def pair_up(tree: Tree, images: str, labels: str, label_ending: str, image_ending: str = "") -> Pairs:
    """Pair the images below one folder with the labels below another.

    A label has its image's path, with `label_ending` in the place of `image_ending`, or of whatever follows the last
    dot. Raises: InputError when a folder is not there, two images claim one label, or nothing pairs.
    """
    listed = tree.images(images)
    items = [item for _, item in sorted(listed.items()) if item.key.endswith(image_ending)]
    names = {item.key: _stem(item.key, image_ending) + label_ending for item in items}
    found = _labels(tree, labels, label_ending, images)
    _refuse_twins(tree.root, images, names)
    paired = [item for item in items if names[item.key] in found]
    if not paired:
        seen = f"image {items[0].key}, which would have {names[items[0].key]}" if items else "no image"
        raise InputError(
            f"{tree.root}: no image in {images} has its label in {labels}: there is {seen}, "
            f"and {few(sorted(found)) or f'no file that ends in {label_ending}'}; check the root"
        )
    alone = [item.key for item in items if names[item.key] not in found]
    unused = sorted(found.keys() - names.values())
    rows = [(_join(labels, names[item.key]), found[names[item.key]]) for item in paired]
    return Pairs(paired, rows, left_over(alone, images, unused, labels))


def left_over(images: Sequence[str], images_in: str, labels: Sequence[str], labels_in: str) -> tuple[str, ...]:
    """What to say of images without a label, and of labels without an image."""
    notes = []
    if images:
        num = count_of(len(images), "image")
        notes.append(f"left out {num} of {images_in} without a label in {labels_in}: {few(images)}")
    if labels:
        num = count_of(len(labels), "label")
        notes.append(f"left out {num} of {labels_in} without an image in {images_in}: {few(labels)}")
    return tuple(notes)


def _labels(tree: Tree, labels: str, ending: str, images: str) -> Mapping[str, str]:
    """Path below the folder of labels to URI."""
    start = len(_join(labels, ""))
    files = {name[start:]: uri for name, uri in tree.files(labels).items() if name.endswith(ending)}
    return {name: uri for name, uri in files.items() if labels != images or not is_image(name)}


def _stem(key: str, ending: str) -> str:
    return key.removesuffix(ending) if ending else without_ending(key)


def _refuse_twins(root: str, images: str, names: Mapping[str, str]) -> None:
    keys: dict[str, str] = {}
    for key, name in names.items():
        if name in keys:
            raise InputError(f"{root}: {keys[name]} and {key} of {images} have one label, {name}; leave one of them")
        keys[name] = key


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
