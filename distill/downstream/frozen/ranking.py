"""Average precision of the foreground: how well its cells are ranked above the others, whatever the threshold.

Cells are counted by class and logit, in bins so narrow that ties hardly matter, so that memory does not grow with the
held-out images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.engine.device import as_float64

LARGEST_LOGIT = 16.0
"""Surer answers count as this sure."""
BIN = 1 / 256
_NUM_BINS = round(2 * LARGEST_LOGIT / BIN) + 1


class ForegroundRanking:
    """Counts of background and foreground cells by logit."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * _NUM_BINS, dtype=torch.int64)

    def add(self, truth: Tensor, logits: Tensor) -> None:
        """Take in cells. Shapes: truth (B, h, w) of 0, 1 and `IGNORE`; logits (B, h, w) of the foreground."""
        known = truth != IGNORE
        clamped = as_float64(logits[known]).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        places = truth[known].to(clamped.device) * _NUM_BINS + ((clamped + LARGEST_LOGIT) / BIN).round().long()
        self.counts += torch.bincount(places, minlength=len(self.counts)).cpu()

    def average_precision(self) -> float | None:
        """Area under precision over recall, scikit-learn's; None where one of the classes does not occur."""
        from sklearn.metrics import average_precision_score  # slow to import

        background, foreground = self.counts.view(2, _NUM_BINS)
        if not background.any() or not foreground.any():
            return None
        truth = [0] * _NUM_BINS + [1] * _NUM_BINS
        scores = [*range(_NUM_BINS), *range(_NUM_BINS)]
        return float(average_precision_score(truth, scores, sample_weight=self.counts.numpy()))
