"""Objects from pixels that each belong to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.labels import Instances


def instances_of(values: NDArray[np.integer[Any]], objects: Sequence[tuple[int, int, bool]]) -> Instances:
    """The objects whose pixels hold a value: (value, class number, crowd) of each. Shapes: values (H, W).

    Boxes and areas are those of the pixels. A value that no pixel holds is passed over.
    """
    masks = np.zeros((len(objects), *values.shape), dtype=bool)
    for idx, (value, _, _) in enumerate(objects):
        masks[idx] = values == value
    return instances_of_masks(masks, [(number, crowd) for _, number, crowd in objects])


def instances_of_masks(masks: NDArray[np.bool_], objects: Sequence[tuple[int, bool]]) -> Instances:
    """Objects with their masks (n, H, W), and class number and crowd of each; empty masks are passed over."""
    present = masks.any(axis=(1, 2)) if len(masks) else np.zeros(0, bool)
    masks = masks[present]
    return Instances(
        size_px=(masks.shape[1], masks.shape[2]),
        boxes=np.array([_box(mask) for mask in masks], dtype=np.float64).reshape(-1, 4),
        classes=np.array([number for number, _ in objects], dtype=np.int64)[present],
        masks=masks,
        crowd=np.array([crowd for _, crowd in objects], dtype=bool)[present],
        areas=masks.sum(axis=(1, 2), dtype=np.float64),
    )


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom; the right and bottom edges are outside."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
