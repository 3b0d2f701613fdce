"""What networks with heads say of an image, one record per kind of target; all arrays have the image's own size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """How likely each class is."""

    probabilities: NDArray[np.float32]
    """(K,)"""


@dataclass(frozen=True, eq=False)
class MaskPrediction:
    """The class of each pixel."""

    numbers: NDArray[np.integer[Any]]
    """(H, W) most likely class."""
    foreground: NDArray[np.float32] | None = None
    """(H, W) probability of the second class, where there are two: threshold-free scores need it."""


@dataclass(frozen=True, eq=False)
class Detections:
    """Objects, the surest first."""

    size_px: tuple[int, int]
    boxes: NDArray[np.float32]
    """(n, 4) left, top, right, bottom in px."""
    classes: NDArray[np.int64]
    """(n,) numbers in the class table, from 0."""
    scores: NDArray[np.float32]
    """(n,)"""
    masks: NDArray[np.bool_] | None = None
    """(n, H, W); None from a head that was trained on boxes alone."""


@dataclass(frozen=True, eq=False)
class PanopticPrediction:
    """The segment of each pixel."""

    segments: NDArray[np.int32]
    """(H, W) ids; 0 where nothing is said."""
    classes: Mapping[int, int]
    """Segment id to class number."""
