"""Feature maps as pictures: the three directions of most variance become red, green and blue.

Levels that are to be compared must share one basis: give them as a list, since a basis of each would make equal colours
mean different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import ShapeError

Level = NDArray[Any]
Rgb = NDArray[np.uint8]

_RANGE_PERCENT = (1.0, 99.0)  # shown as black and full colour; beyond is clipped
_FLAT = 1e-5  # a direction with a standard deviation below this share of the first one's is noise
_MID_GREY = 128


@overload
def pca_to_rgb(level: Level) -> Rgb: ...
@overload
def pca_to_rgb(level: Sequence[Level], num_deciding: int | None = None) -> list[Rgb]: ...
def pca_to_rgb(level: Level | Sequence[Level], num_deciding: int | None = None) -> Rgb | list[Rgb]:
    """First three principal components over all positions as red, green and blue; flat directions are mid-grey.

    The sign is fixed (the largest weight of each component is positive), so that equal features give equal pictures. Of
    a list, all levels decide the components and the range of colours, or only the first `num_deciding`.

    Shapes: level (C, H, W), any float -> (H, W, 3) uint8; or a list of levels of equal C -> a list of pictures.
    Raises: ShapeError when a level is not (C, H, W) or the channels differ.
    """
    if isinstance(level, np.ndarray):
        return _pictures([level], None)[0]
    return _pictures(list(level), num_deciding)


def _pictures(levels: list[Level], num_deciding: int | None) -> list[Rgb]:
    if not levels:
        return []
    if any(level.ndim != 3 for level in levels) or len({level.shape[0] for level in levels}) != 1:
        raise ShapeError(
            f"levels for one picture basis are (C, H, W) with equal C, not {[level.shape for level in levels]}"
        )
    positions = np.concatenate([level.reshape(level.shape[0], -1).T for level in levels]).astype(np.float64)  # (N, C)
    sizes = [level.shape[1] * level.shape[2] for level in levels]
    deciding = sum(sizes[:num_deciding])
    colours = _colours(positions - positions[:deciding].mean(axis=0), deciding)  # (N, 3)
    parts = np.split(colours, np.cumsum(sizes)[:-1])
    return [part.reshape(*level.shape[1:], 3) for part, level in zip(parts, levels, strict=True)]


def _colours(centred: NDArray[np.float64], deciding: int) -> Rgb:
    """Shapes: (N, C), of which the first `deciding` set basis and range -> (N, 3)."""
    scores = centred @ _components(centred[:deciding])  # (N, up to 3)
    known = scores[:deciding]
    spread = known.std(axis=0)
    colours = np.full((len(centred), 3), _MID_GREY, dtype=np.uint8)
    for idx in range(scores.shape[1]):
        if spread[idx] > max(_FLAT * spread[0], 1e-12):
            low, high = np.percentile(known[:, idx], _RANGE_PERCENT)
            if high <= low:  # under one position in a hundred stands out
                low, high = known[:, idx].min(), known[:, idx].max()
            colours[:, idx] = np.rint(np.clip((scores[:, idx] - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return colours


def _components(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Directions of most variance, with fixed signs. Shapes: (N, C) -> (C, up to 3)."""
    if len(centred) >= centred.shape[1]:
        vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]  # eigenvalues ascend
    else:
        vectors = np.linalg.svd(centred, full_matrices=False)[2].T
    vectors = vectors[:, :3]
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    fixed: NDArray[np.float64] = vectors * signs
    return fixed
