"""Images to draw labels from and images held out, as the settings of `dtpipe eval` name them.

Frozen tasks take them at one size, tuned ones whole. Both sides number classes as the images to learn from do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.registry import parse_layout
from dtpipe.extract.sources.layouts.renumbered import with_classes_of
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class, Instances, Mask, Panoptic, Target
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.labelled import LabelledReader, open_labelled, split_by_key

_KINDS = {Class: "classes", Mask: "masks", Instances: "objects", Panoptic: "segments"}


def label_kind(config: EvalConfig) -> type[Target]:
    """What the labels will be, before anything is opened."""
    if parsed := parse_layout(config.images):
        return parsed[0].kind
    return Mask if config.masks else Class


def open_sets(config: EvalConfig, recipe: TransformRecipe | None, note: Note) -> tuple[LabelledSet, LabelledSet]:
    """Images to draw labels from, and images held out; whole ones without a recipe.

    Keys of held-out images begin with `held out/` where --test-images names them. Raises: InputError, ConfigError.
    """
    source = open_labelled(config.images, config.masks, config.ignore_value, config.class_names)
    _say(source, note)
    reader = LabelledReader(source, recipe, config.images)
    if config.test_images is None:
        parts = _split(config, source)
        train, test = (reader.select(_limited(part, config.limit), note) for part in parts)
    else:
        held_out = _open_held_out(config, source, note)
        train = reader.select(_limited(range(len(source.items)), config.limit), note)
        rows = _limited(range(len(held_out.items)), config.limit)
        test = LabelledReader(held_out, recipe, config.test_images).select(rows, note, prefix="held out/")
    if config.foreground:
        return train.as_masks().foreground(), test.as_masks().foreground()
    table = max((train.classes, test.classes), key=len)  # of masks that nobody has named, either may hold more
    return replace(train, classes=table), replace(test, classes=table)


def _open_held_out(config: EvalConfig, source: LabelledSource, note: Note) -> LabelledSource:
    assert config.test_images is not None
    if config.test_images == config.images:
        raise ConfigError(f"{config.images} is both --images and --test-images; leave out --test-images to split it")
    held_out = open_labelled(config.test_images, config.test_masks, config.ignore_value, config.class_names)
    if held_out.kind is not source.kind:
        raise ConfigError(
            f"{config.images} has {_KINDS[source.kind]} for labels and {config.test_images} {_KINDS[held_out.kind]}; "
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
