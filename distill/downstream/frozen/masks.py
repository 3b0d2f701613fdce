"""Masks that a read-out gives to a few held-out images, for people to look at; no score comes from them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dtpipe.distill.downstream.kept import PREDICTED, keep_keys, keep_prediction
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.distill.downstream.tuned.segmentation.files import save_mask
from dtpipe.manifests.labels import ClassTable

MOST_KEPT = 64
"""Images: as many as a page shows at most."""
_ROOM = "make room or choose another --out"


@dataclass(frozen=True)
class KeptMasks:
    """A folder that masks go to as they are predicted."""

    folder: Path
    places: Mapping[int, int]
    """Row of an image that is kept to its place among them."""
    classes: ClassTable
    stride: int
    """Image px per cell."""

    @classmethod
    def begin(cls, folder: Path, test: LabelledSet, stride: int) -> KeptMasks:
        """Of images at equal steps through a set; those of before go. Raises: StoreError."""
        rows = np.unique(np.linspace(0, len(test) - 1, min(len(test), MOST_KEPT)).round().astype(int)).tolist()
        shutil.rmtree(folder / PREDICTED, ignore_errors=True)
        keep_keys(folder, [test.keys[row] for row in rows], _ROOM)
        return cls(folder, {row: place for place, row in enumerate(rows)}, test.classes, stride)

    def add(self, rows: Sequence[int], cells: Tensor) -> None:
        """Take in the classes of cells, which are drawn as large as they were scored.

        Shapes: (B, h, w). Raises: StoreError.
        """
        for row, numbers in zip(rows, cells.cpu().numpy(), strict=True):
            if row in self.places:
                mask = MaskPrediction(numbers.repeat(self.stride, axis=0).repeat(self.stride, axis=1))
                keep_prediction(self.folder, self.places[row], save_mask(mask, self.classes), _ROOM)
