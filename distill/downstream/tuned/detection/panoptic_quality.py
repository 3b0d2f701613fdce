"""Panoptic quality as its paper defines it: PQ, SQ and RQ of all classes, of things and of stuff.

Source: Kirillov et al., Panoptic Segmentation, arXiv 1801.00868, section 4; cocodataset/panopticapi `evaluation.py`.
Differs from torchmetrics' `PanopticQuality`, which takes pixels that a prediction leaves empty out of the union,
forgives true segments that are mostly left empty, and knows no crowds; where a prediction says something everywhere and
there is no crowd, both give the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.downstream.tuned.base import Metric, TaskScores
from dtpipe.distill.downstream.tuned.predictions import PanopticPrediction
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Panoptic, Target
from dtpipe.manifests.words import count_of

MATCHED_IOU = 0.5
REMOVED_SHARE = 0.5
_VOID = 0

Counts = NDArray[np.float64]
"""(K, 4): sum of the IoU of matched segments, matched, wrongly predicted and missed segments of each class."""


@dataclass
class PanopticScores:
    """Counts of images by key, so that one that several ranks have seen counts once."""

    classes: ClassTable
    counts: dict[str, Counts] = field(default_factory=dict)

    def add(self, key: str, prediction: PanopticPrediction, target: Target) -> None:
        """Match the segments of an image."""
        assert isinstance(target, Panoptic)
        self.counts[key] = match_segments(prediction, target, len(self.classes))

    def merge(self, other: Metric[PanopticPrediction]) -> None:
        """Take in the images of another."""
        assert isinstance(other, PanopticScores)
        self.counts |= other.counts

    def scores(self) -> TaskScores:
        """PQ; its parts are means over the classes that occur, in the truth or in what is predicted.

        Raises: InputError when no segment counts.
        """
        total = sum((self.counts[key] for key in sorted(self.counts)), np.zeros((len(self.classes), 4)))
        if not total[:, [1, 3]].any():
            raise InputError(
                f"of {count_of(len(self.counts), 'held-out image')}, none holds a segment that counts; "
                "give held-out images with known segments"
            )
        quality = segment_quality(total)
        others: dict[str, float] = {}
        groups = {"": range(len(self.classes)), " things": self.classes.things, " stuff": self._stuff()}
        for group, numbers in groups.items():
            others |= {f"{name}{group}": value for name, value in _means(quality, numbers).items()}
        by_class = {
            name: dict(zip(self.classes.names, map(_known, values), strict=True)) for name, values in quality.items()
        }
        return TaskScores(others.pop("PQ"), others, by_class)

    def _stuff(self) -> set[int]:
        return set(range(len(self.classes))) - self.classes.things


def segment_quality(counts: Counts) -> dict[str, Counts]:
    """PQ, SQ and RQ of each class; NaN for one that occurs nowhere. Shapes: (K, 4) -> (K,) each."""
    ious, matched, wrong, missed = counts.T
    occurring = matched + wrong + missed > 0
    weight = np.where(occurring, matched + 0.5 * wrong + 0.5 * missed, np.nan)
    segmentation = np.where(occurring, ious / np.maximum(matched, 1), np.nan)
    return {"PQ": ious / weight, "SQ": segmentation, "RQ": matched / weight}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _means(quality: Mapping[str, Counts], numbers: Collection[int]) -> dict[str, float]:
    """Over the classes that occur; nothing when none does."""
    rows = sorted(numbers)
    known = [row for row in rows if not np.isnan(quality["PQ"][row])]
    return {name: float(values[known].mean()) for name, values in quality.items()} if known else {}


def match_segments(prediction: PanopticPrediction, target: Panoptic, num_classes: int) -> Counts:
    """Count what one image adds.

    A predicted and a true segment of one class match where their IoU, without the pixels of the prediction at which
    nothing is known, is above one half. Predicted segments that match none are not counted where more than half of them
    is unknown or a crowd of their class. Crowds are never missed. Shapes: (H, W) segments of both -> (K, 4).
    """
    true_areas, said_areas, overlaps = _areas(prediction, target)
    counts = np.zeros((num_classes, 4))
    matched_true, matched_said = set(), set()
    for (true, said), overlap in overlaps.items():
        number = target.classes.get(true)
        if true in target.crowd or number is None or number != prediction.classes[said]:
            continue
        union = true_areas[true] + said_areas[said] - overlap - overlaps.get((_VOID, said), 0)
        if overlap / union > MATCHED_IOU:
            counts[number, :2] += overlap / union, 1
            matched_true.add(true)
            matched_said.add(said)
    for said in said_areas.keys() - matched_said:
        number = prediction.classes[said]
        crowds = sum(overlaps.get((true, said), 0) for true in target.crowd if target.classes.get(true) == number)
        if (overlaps.get((_VOID, said), 0) + crowds) / said_areas[said] <= REMOVED_SHARE:
            counts[number, 2] += 1
    for true in true_areas.keys() - matched_true - target.crowd:
        counts[target.classes[true], 3] += 1
    return counts


def _areas(
    prediction: PanopticPrediction, target: Panoptic
) -> tuple[dict[int, int], dict[int, int], dict[tuple[int, int], int]]:
    """Pixels of each true segment, each predicted one, and each pair of them; true ids without a class are void."""
    known = np.isin(target.segments, list(target.classes))
    pairs = np.stack([np.where(known, target.segments, _VOID), prediction.segments]).reshape(2, -1)
    both, areas = np.unique(pairs, axis=1, return_counts=True)
    true_areas: dict[int, int] = {}
    said_areas: dict[int, int] = {}
    overlaps: dict[tuple[int, int], int] = {}
    for (true, said), area in zip(both.T.tolist(), areas.tolist(), strict=True):
        if true != _VOID:
            true_areas[true] = true_areas.get(true, 0) + area
        if said != _VOID:
            said_areas[said] = said_areas.get(said, 0) + area
            overlaps[true, said] = area
    return true_areas, said_areas, overlaps
