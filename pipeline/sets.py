"""Images to draw labels from and images held out, as the settings of `dtpipe eval` name them.

Frozen tasks take them at one size, tuned ones whole. Both sides number classes as the images to learn from do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtpipe.distill.downstream.labelled import LabelledSet, join_sets
from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.registry import parse_layout
from dtpipe.extract.sources.layouts.renumbered import with_classes_of
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import KIND_WORDS, Class, Mask, Target
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.labelled import LabelledReader, open_labelled, split_by_key


def label_kind(config: EvalConfig) -> type[Target]:
    """What the labels will be, before anything is opened."""
    if parsed := parse_layout(config.images):
        return parsed[0].kind
    return Mask if config.masks else Class


def open_sets(
    config: EvalConfig, recipe: TransformRecipe | None, note: Note, as_masks: bool = False
) -> tuple[LabelledSet, LabelledSet]:
    """Images to draw labels from, and images held out; whole ones without a recipe, objects as masks where asked for.

    Keys of held-out images begin with `held out/` where --test-images names them. Raises: InputError, ConfigError.
    """
    train, test = (side.select(recipe, as_masks, note) for side in _sides(config, note))
    if config.foreground:
        return train.as_masks().foreground(), test.as_masks().foreground()
    table = max((train.classes, test.classes), key=len)  # of masks that nobody has named, either may hold more
    return replace(train, classes=table), replace(test, classes=table)


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


def _sides(config: EvalConfig, note: Note) -> tuple[_Side, _Side]:
    """To draw labels from, and held out; what the sources leave out is said."""
    source = open_labelled(config.images, config.masks, config.ignore_value, config.class_names)
    _say(source, note)
    if config.test_images is None:
        train, test = (_limited(rows, config.limit) for rows in _split(config, source))
        return _Side(source, train, config.images), _Side(source, test, config.images)
    held_out = _open_held_out(config, source, note)
    train, test = (_limited(range(len(side.items)), config.limit) for side in (source, held_out))
    return _Side(source, train, config.images), _Side(held_out, test, config.test_images, "held out/")


def _open_held_out(config: EvalConfig, source: LabelledSource, note: Note) -> LabelledSource:
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


def _split(config: EvalConfig, source: LabelledSource) -> tuple[list[int], list[int]]:
    keys, labels = [item.key for item in source.items], [item.label for item in source.items]
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
