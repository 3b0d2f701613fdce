"""Which samples of the data are trained on: by a file of keys, by patterns, and up to a limit.

One rule: what names nothing is an error, since a mistyped key or pattern would otherwise train on other data than
meant.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.config import DistillRecipeConfig
from dtpipe.distill.stream.order import key_hashes
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.listing import missing_keys, normal_keys, read_key_file

if TYPE_CHECKING:
    from dtpipe.manifests.read.source import FeatureSource

_Rows = NDArray[np.int64]


def select_rows(source: FeatureSource, config: DistillRecipeConfig) -> _Rows:
    """Good rows that the settings choose, ascending.

    `limit` takes the keys with the smallest hashes: the same samples in every dataset of these images, whatever its
    order, and those of a smaller limit are among those of a larger one.
    Raises: InputError for a key that is not in the data, or when no row is left; ConfigError for a pattern that matches
    none.
    """
    keys, ok_rows = source.columns.keys, source.columns.ok_rows
    chosen = np.ones(len(keys), dtype=bool)
    if config.keys is not None:
        chosen &= _in_file(keys, config.keys)
    if config.include:
        chosen &= _matching(keys, config.include, "include")
    if config.exclude:
        chosen &= ~_matching(keys, config.exclude, "exclude")
    rows = ok_rows[chosen[ok_rows]]
    if len(rows) == 0:
        raise InputError(_nothing_left(len(ok_rows), int(chosen.sum())))
    if config.limit is not None and config.limit < len(rows):
        hashes = key_hashes([keys[row] for row in rows])
        rows = np.sort(rows[np.argsort(hashes, kind="stable")[: config.limit]])
    return rows


def _nothing_left(num_ok: int, num_chosen: int) -> str:
    if num_ok == 0:
        return (
            "the data has no good sample to train on; `dtpipe inspect` lists the bad ones, and says which shards are "
            "missing"
        )
    if num_chosen == 0:
        return "--keys, --include and --exclude together leave no sample to train on; widen one of them"
    chosen = f"each of {count_of(num_chosen, 'chosen sample')} is bad or not written yet"
    return f"{chosen}; `dtpipe inspect` says why, or choose others"


def _in_file(keys: Sequence[str], path: str) -> NDArray[np.bool_]:
    listed = normal_keys(read_key_file(path, "distill.keys"))
    if lost := missing_keys(listed, keys):
        raise InputError(f"{path}: {lost} are not in the data; check --keys against `dtpipe inspect`")
    return np.array([key in listed for key in keys], dtype=bool)


def _matching(keys: Sequence[str], patterns: Sequence[str], field: str) -> NDArray[np.bool_]:
    """Where any of the patterns matches."""
    chosen = np.zeros(len(keys), dtype=bool)
    for pattern in patterns:
        matches = re.compile(fnmatch.translate(pattern)).match
        matching = np.array([matches(key) is not None for key in keys], dtype=bool)
        if not matching.any():
            raise ConfigError(f"distill.{field}: pattern {pattern!r} matches no key; keys look like {keys[0]!r}")
        chosen |= matching
    return chosen
