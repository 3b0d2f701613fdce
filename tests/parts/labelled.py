"""A labelled set over arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.manifests.labels import Class, ClassTable, Mask


def with_classes(images: np.ndarray, keys: Sequence[str], classes: Sequence[int] | np.ndarray) -> LabelledSet:
    table = ClassTable.numbered(int(max(classes)) + 1)
    return LabelledSet(tuple(keys), Class, table, lambda row: images[row], lambda row: Class(int(classes[row])))


def with_masks(images: np.ndarray, keys: Sequence[str], masks: np.ndarray, ignore: int | None = 255) -> LabelledSet:
    table = ClassTable.numbered(max(max(Mask(mask, ignore).occurring, default=0) for mask in masks) + 1)
    return LabelledSet(tuple(keys), Mask, table, lambda row: images[row], lambda row: Mask(masks[row], ignore))


def all_images(labelled: LabelledSet) -> np.ndarray:
    """Shapes: -> (N, H, W, 3) uint8."""
    return labelled.read_images(range(len(labelled))).numpy()


def all_masks(labelled: LabelledSet) -> np.ndarray:
    """Shapes: -> (N, H, W) int64, -1 where a pixel is ignored."""
    return labelled.read_masks(range(len(labelled))).numpy()
