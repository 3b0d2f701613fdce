"""What classifiers on frozen features say of a few held-out images, for people to look at; no score comes from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from dtpipe.distill.downstream.classes import save_classes
from dtpipe.distill.downstream.kept import PREDICTED, keep_keys, keep_prediction
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction, MaskPrediction
from dtpipe.distill.downstream.tuned.segmentation.files import save_mask
from dtpipe.manifests.labels import ClassTable

MOST_KEPT = 64
"""Images: as many as a page shows at most."""
_ROOM = "make room or choose another --out"


@dataclass(frozen=True)
class ShownImages:
    """A folder that predictions go to."""

    folder: Path
    places: Mapping[int, int]
    """Row of an image that is kept to its place among them."""
    classes: ClassTable

    @classmethod
    def begin(cls, folder: Path, test: LabelledSet) -> ShownImages:
        """Images at equal steps through a set; those of before go. Raises: StoreError."""
        rows = np.unique(np.linspace(0, len(test) - 1, min(len(test), MOST_KEPT)).round().astype(int)).tolist()
        shutil.rmtree(folder / PREDICTED, ignore_errors=True)
        keep_keys(folder, [test.keys[row] for row in rows], _ROOM)
        return cls(folder, {row: place for place, row in enumerate(rows)}, test.classes)

    def add_masks(self, rows: Sequence[int], cells: Tensor, stride: int) -> None:
        """Take in the classes of cells of `stride` px, which are drawn as large as they were scored.

        Shapes: (B, h, w). Raises: StoreError.
        """
        for row, numbers in zip(rows, cells.cpu().numpy(), strict=True):
            if row in self.places:
                mask = MaskPrediction(numbers.repeat(stride, axis=0).repeat(stride, axis=1))
                self._keep(row, save_mask(mask, self.classes))

    def add_classes(self, probabilities: Tensor) -> None:
        """Take in how likely each class of each held-out image is. Shapes: (N, K). Raises: StoreError."""
        for row in self.places:
            self._keep(row, save_classes(ClassPrediction(probabilities[row].float().numpy()), self.classes))

    def _keep(self, row: int, files: Iterable[tuple[str, bytes]]) -> None:
        keep_prediction(self.folder, self.places[row], files, _ROOM)
