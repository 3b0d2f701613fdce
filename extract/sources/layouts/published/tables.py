"""Class tables as published: `classes.yaml` beside this file, by the names of layouts and sets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from dtpipe.manifests.labels import ClassTable


@cache
def published_classes(name: str) -> ClassTable:
    """The classes of a published set; `numbers` holds the set's own where they are not those of the table."""
    entry = _entries()[name]
    names: list[str] = entry["names"]
    first = entry.get("first", 0)
    own = entry.get("ids", range(first, first + len(names)))
    things = frozenset(names.index(thing) for thing in entry.get("things", ()))
    return ClassTable(tuple(names), things, {} if own == range(len(names)) else dict(enumerate(own)))


@cache
def imagenet_names() -> Mapping[str, str]:
    """WordNet id of each of the 1000 classes to its name, which holds the id where two classes are called alike."""
    lines = (files(__package__) / "imagenet.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


@cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    entries: Mapping[str, Mapping[str, Any]] = yaml.safe_load((files(__package__) / "classes.yaml").read_text("utf-8"))
    return entries
