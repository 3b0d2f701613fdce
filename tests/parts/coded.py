"""Shards of features as arrays in memory, coded by the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import FittedArrays, array_name, encode_level
from dtpipe.manifests.codecs.fitted import NOT_FITTED
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.layout.arrays import ShardArrays, stored_arrays
from dtpipe.manifests.schema import IMAGE, IndexRow, Recipe


def code_features(
    recipe: Recipe,
    image: NDArray[np.uint8] | None,
    features: Mapping[str, NDArray[np.generic]],
    rows: Sequence[IndexRow],
    fitted: FittedArrays = NOT_FITTED,
) -> ShardArrays:
    """A shard of features, coded by the reference; bad rows become zeros.

    Shapes: image [n, H, W, 3] or None, features {level: [n, V, C, H, W]}.
    Raises: what `encode_level` raises, naming level and sample.
    """
    arrays = {name: np.zeros(spec.shape(len(rows)), spec.dtype) for name, spec in stored_arrays(recipe).items()}
    for idx, row in enumerate(rows):
        if row.status != "ok":
            continue
        if image is not None:
            arrays[IMAGE][idx] = image[idx]
        for level, codec in level_codecs(recipe, fitted).items():
            for part, values in encode_level(codec, features[level][idx], row.key).items():
                arrays[array_name(level, part)][idx] = values
    return ShardArrays(arrays, rows)
