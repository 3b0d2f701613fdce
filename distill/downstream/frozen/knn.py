"""k nearest neighbours on pooled features, by cosine, as in InstDisc and DINO.

Source: Wu et al., arXiv 1805.01978, section 3.4; facebookresearch/dino `eval_knn.py` (k = 20, temperature 0.07).
Nothing is fitted, so few labels are enough; the level is chosen by leaving each labelled image out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor
from dtpipe.distill.downstream.frozen.probe import fixed_score, pooled_levels, pooled_rows
from dtpipe.distill.downstream.labelled import Draw, LabelledSet, count_classes, share_classes
from dtpipe.distill.downstream.result import ACCURACY, Score, mark_best
from dtpipe.manifests.labels import Class
from dtpipe.manifests.phases import counted

QUERY_ROWS = 4096  # queries whose similarities to all labelled images are held at once


def knn_votes(
    queries: Tensor,
    references: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
    leave_one_out: bool = False,
) -> Tensor:
    """Votes of the k nearest references for each query, each weighing exp(cosine / temperature).

    Shapes: queries (m, D), references (n, D), labels (n,) int64 -> (m, K). With `leave_one_out` the queries are the
    references themselves and none is its own neighbour.
    """
    queries, references = F.normalize(queries, dim=1), F.normalize(references, dim=1)
    votes = queries.new_zeros(len(queries), num_classes)
    for start in range(0, len(queries), QUERY_ROWS):
        similarity = queries[start : start + QUERY_ROWS] @ references.T  # (rows, n)
        if leave_one_out:
            own = torch.arange(len(similarity), device=similarity.device)
            similarity[own, start + own] = -torch.inf
        nearest, idx = similarity.topk(k, dim=1)  # (rows, k)
        weights = torch.exp((nearest - nearest[:, :1]) / temperature)  # the nearest weighs 1: no overflow, same winner
        votes[start : start + QUERY_ROWS].scatter_add_(1, labels[idx], weights)
    return votes


def neighbours(num_labelled: int, num_classes: int, k: int) -> int:
    """How many vote: `k`, but no more than there are images per class, so that no class is outvoted by count."""
    return max(1, min(k, num_labelled // num_classes))


def knn_probe(
    extractor: FeatureExtractor, train: LabelledSet, test: LabelledSet, draws: Sequence[Draw], config: ProbeConfig
) -> list[Score]:
    """Held-out accuracy of every level in every draw, the best of each draw marked, and of the fixed candidate."""
    train, test = share_classes(train, test)
    num_classes, classes = count_classes(train, test), train.read_classes()
    held_out = pooled_levels(extractor, test, config.batch_size, concatenated=False)
    truth = torch.from_numpy(test.read_classes())
    used, pooled = pooled_rows(extractor, train, draws, config.batch_size, concatenated=False)
    scores = []
    for draw in counted(draws, len(draws), "draws of labels"):
        k = neighbours(len(draw.rows), len(np.unique(classes[draw.rows])), config.k)
        candidates = []
        for level, features in pooled.items():
            own = features[torch.from_numpy(np.searchsorted(used, draw.rows)).to(features.device)]
            labels = torch.from_numpy(classes[draw.rows]).to(own.device)
            votes = knn_votes(held_out[level], own, labels, num_classes, k, config.temperature)
            value = float((votes.argmax(dim=1).cpu() == truth).double().mean())
            selection = _leave_one_out(own, labels, num_classes, k, config.temperature)
            candidates.append(
                Score(extractor.name, level, len(draw.rows), draw.seed, value, selection, settings={"k": k})
            )
        shares = (votes / votes.sum(dim=1, keepdim=True)).cpu()
        scores += [*mark_best(candidates), fixed_score(extractor.name, draw, shares, test, {"k": k})]
    return scores


def _leave_one_out(features: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> float | None:
    """Share of labelled images whose neighbours among the others are right; None where a class has a single image."""
    if len(features) < 2 * len(set(labels.tolist())):
        return None
    k = min(k, len(features) - 1)
    votes = knn_votes(features, features, labels, num_classes, k, temperature, leave_one_out=True)
    return float((votes.argmax(dim=1) == labels).cpu().double().mean())


TASK = Task(
    "knn",
    "from class labels: weighted nearest neighbours by cosine of pooled features; accuracy",
    Class,
    metric=lambda _num_classes: ACCURACY,
    score=knn_probe,
    reads=frozenset(("k", "temperature", "batch_size")),
    headline=lambda config: f"the last level, up to {config.k} neighbours: nothing is chosen",
)
