"""Images to draw labels from and images held out, as the settings of `dtpipe eval` name them.

Frozen tasks take them at one size, tuned ones whole. Both sides number classes as the images to learn from do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtpipe.distill.downstream.labelled import LabelledSet, join_sets, share_classes
from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.registry import parse_layout
from dtpipe.extract.sources.layouts.renumbered import with_classes_of
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import KIND_WORDS, Class, Mask, Target
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.manifests.write.listing import missing_keys, normal_keys, read_key_file
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.config import EvalConfig, LabelledImages
from dtpipe.pipeline.labelled import LabelledReader, open_labelled, split_by_key


def label_kind(config: LabelledImages) -> type[Target]:
    """What the labels will be, before anything is opened."""
    if parsed := parse_layout(config.images):
        return parsed[0].kind
    return Mask if config.masks else Class


def open_sets(
    config: LabelledImages, recipe: TransformRecipe | None, note: Note, as_masks: bool = False
) -> tuple[LabelledSet, LabelledSet]:
    """Images to draw labels from, and images held out; whole ones without a recipe, objects as masks where asked for.

    Keys of held-out images begin with `held out/` where --test-images names them. Raises: InputError, ConfigError.
    """
    train, test = (side.select(recipe, as_masks, note) for side in _sides(config, note))
    if config.foreground:
        return train.as_masks().foreground(), test.as_masks().foreground()
    return share_classes(train, test)


def open_held_out(config: EvalConfig, recipe: TransformRecipe | None, note: Note) -> LabelledSet:
    """The held-out images of `open_sets` alone, to compare them by content; their classes may count fewer.

    With --resplit these are all images, since some seed holds out each.
    """
    if config.resplit:
        return join_sets(*open_sets(config, recipe, note))
    return _sides(config, note)[1].select(recipe, False, note)


@dataclass(frozen=True)
class _Side:
    """Some rows of a source."""

    source: LabelledSource
    rows: Sequence[int]
    where: str
    prefix: str = ""

    def select(self, recipe: TransformRecipe | None, as_masks: bool, note: Note) -> LabelledSet:
        return LabelledReader(self.source, recipe, self.where, as_masks).select(self.rows, note, self.prefix)


def _sides(config: LabelledImages, note: Note) -> tuple[_Side, _Side]:
    """To draw labels from, and held out; what the sources leave out is said."""
    source = open_labelled(config.images, config.masks, config.ignore_value, config.class_names)
    _say(source, note)
    if config.test_images is None:
        train, test = (_limited(rows, config.limit) for rows in _split(config, source))
        return _Side(source, train, config.images), _Side(source, test, config.images)
    held_out = _open_held_out(config, source, note)
    train = _limited(_chosen(config, source), config.limit)
    test = _limited(range(len(held_out.items)), config.limit)
    return _Side(source, train, config.images), _Side(held_out, test, config.test_images, "held out/")


def _open_held_out(config: LabelledImages, source: LabelledSource, note: Note) -> LabelledSource:
    assert config.test_images is not None
    if config.test_images == config.images:
        raise ConfigError(f"{config.images} is both --images and --test-images; leave out --test-images to split it")
    held_out = open_labelled(config.test_images, config.test_masks, config.ignore_value, config.class_names)
    if held_out.kind is not source.kind:
        own, other = KIND_WORDS[source.kind], KIND_WORDS[held_out.kind]
        raise ConfigError(
            f"{config.images} has {own} for labels and {config.test_images} {other}; "
            "give held-out images with the same kind of labels"
        )
    _say(held_out, note)
    return with_classes_of(held_out, source.classes) if len(source.classes) else held_out


def _say(source: LabelledSource, note: Note) -> None:
    for sentence in source.notes():
        note(sentence)


def _chosen(config: LabelledImages, source: LabelledSource) -> Sequence[int]:
    """Rows of the images that --keys names, or all. Raises: InputError naming keys that are not there."""
    if config.keys is None:
        return range(len(source.items))
    where = f"{config.SECTION}.keys"
    chosen, keys = normal_keys(read_key_file(config.keys, where)), [item.key for item in source.items]
    if not chosen:
        raise InputError(f"{where}: {config.keys} names no image; write one key per line")
    if lost := missing_keys(chosen, keys):
        raise InputError(
            f"{where}: {config.keys} names {lost} that {config.images} does not hold; {keys[0]!r} is one that it does"
        )
    return [row for row, key in enumerate(keys) if key in chosen]


def _split(config: LabelledImages, source: LabelledSource) -> tuple[Sequence[int], list[int]]:
    keys, labels = [item.key for item in source.items], [item.label for item in source.items]
    train: Sequence[int]
    if config.keys is not None:
        train = _chosen(config, source)
        test = sorted(set(range(len(keys))).difference(train))
    else:
        train, test = split_by_key(keys, labels, config.test_share, config.seed)
    if not test:
        raise ConfigError(
            f"{config.images}: too few images to hold some out ({len(keys)}); give more, or others as --test-images"
        )
    return train, test


def _limited(rows: Sequence[int], limit: int | None) -> Sequence[int]:
    """At most half of `limit` rows, spread evenly over the listing so that every class keeps its share."""
    if limit is None or len(rows) <= limit // 2:
        return rows
    return [rows[idx] for idx in np.linspace(0, len(rows) - 1, limit // 2).astype(int)]
