"""Foreground AP from counts, against scikit-learn and torchmetrics on the cells themselves."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.classification import BinaryAveragePrecision

from dtpipe.distill.downstream.frozen.ranking import BIN, LARGEST_LOGIT, ForegroundRanking


def test_counts_in_batches_give_the_average_precision_of_all_cells() -> None:
    """Logits on the bins' middles, so that counts lose nothing; the libraries sum in other orders."""
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(6, 40, 40, generator=generator) < 0.2).long()
    logits = ((truth + torch.randn(6, 40, 40, generator=generator)) / BIN).round() * BIN
    ranking = ForegroundRanking()
    for batch in (slice(0, 4), slice(4, 6)):
        ranking.add(truth[batch], logits[batch])
    assert ranking.average_precision() == pytest.approx(
        average_precision_score(truth.flatten(), logits.flatten()), abs=1e-9
    )
    metric = BinaryAveragePrecision()
    assert ranking.average_precision() == pytest.approx(float(metric(logits.sigmoid(), truth)), abs=1e-5)


def test_ignored_cells_are_left_out_and_sure_ones_count_as_sure() -> None:
    ranking = ForegroundRanking()
    ranking.add(torch.tensor([[[1, 0, -1]]]), torch.tensor([[[10 * LARGEST_LOGIT, -1e9, 1e9]]]))
    assert ranking.average_precision() == 1.0
    assert int(ranking.counts.sum()) == 2


def test_one_class_alone_has_no_average_precision() -> None:
    ranking = ForegroundRanking()
    ranking.add(torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(1, 2, 2))
    assert ranking.average_precision() is None
