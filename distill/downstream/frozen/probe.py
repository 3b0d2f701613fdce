"""Class-label probe: a linear classifier on the pooled features of each level.

The regularisation comes from a fixed grid and the best level from the candidates, both by cross-validation over the
labelled images alone; held-out images are looked at once, by the classifiers that were chosen before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.classes import ClassMetric
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor, row_batches
from dtpipe.distill.downstream.frozen.linear import LinearClassifier, fit_path
from dtpipe.distill.downstream.frozen.shown import ShownImages
from dtpipe.distill.downstream.labelled import Draw, LabelledSet, count_classes, share_classes
from dtpipe.distill.downstream.result import ACCURACY, ALL_LEVELS, FIXED, Score, mark_best
from dtpipe.manifests.labels import Class
from dtpipe.manifests.phases import counted


@dataclass(frozen=True)
class Choice:
    """What the labelled images chose."""

    classifier: LinearClassifier
    l2: float
    selection: float | None
    """Score across folds; None where there are too few images."""


def pooled_levels(
    extractor: FeatureExtractor, labelled: LabelledSet, batch_size: int, concatenated: bool = True
) -> dict[str, Tensor]:
    """One vector per image and level, and all levels side by side.

    Shapes: -> {level: (N, D)} on the extractor's device.
    """
    parts: dict[str, list[Tensor]] = {}
    for rows in row_batches(labelled, batch_size):
        for name, level in extractor.levels(labelled, rows).items():
            parts.setdefault(name, []).append(level.mean(dim=(2, 3)) if extractor.pool == "mean" else level.flatten(1))
    pooled = {name: torch.cat(part) for name, part in parts.items()}
    if concatenated and len(pooled) > 1:
        pooled[ALL_LEVELS] = torch.cat(list(pooled.values()), dim=1)
    return pooled


def stratified_folds(labels: npt.NDArray[np.int64], num_folds: int) -> npt.NDArray[np.int64] | None:
    """The fold of each labelled image, classes spread evenly; None when most classes have a single image."""
    classes, counts = np.unique(labels, return_counts=True)
    num_folds = min(num_folds, int(np.median(counts)))
    if num_folds < 2:
        return None
    folds = np.zeros(len(labels), dtype=np.int64)
    for label in classes:
        rows = np.flatnonzero(labels == label)
        folds[rows] = np.arange(len(rows)) % num_folds
    return folds


def choose_linear(
    features: Tensor, labels: Tensor, folds: npt.NDArray[np.int64] | None, num_classes: int, config: ProbeConfig
) -> Choice:
    """Fit on all labelled images with the regularisation that is right most often on the fold left out.

    Shapes: features (n, D), labels (n,). Ties go to the stronger regularisation.
    """
    if folds is None:
        l2, selection = config.l2_fallback, None
    else:
        correct = dict.fromkeys(sorted(config.l2_grid, reverse=True), 0)
        for fold in range(int(folds.max()) + 1):
            held = torch.from_numpy(folds == fold).to(features.device)
            for value, classifier in fit_path(
                features[~held], labels[~held], num_classes, config.l2_grid, config.max_iter
            ).items():
                correct[value] += int((classifier.predict(features[held]) == labels[held]).sum())
        l2 = max(correct, key=correct.__getitem__)
        selection = correct[l2] / len(labels)
    return Choice(fit_path(features, labels, num_classes, [l2], config.max_iter)[l2], l2, selection)


def linear_probe(
    extractor: FeatureExtractor, train: LabelledSet, test: LabelledSet, draws: Sequence[Draw], config: ProbeConfig
) -> list[Score]:
    """Held-out accuracy of every level in every draw, the best level of each draw marked, and of the fixed candidate.

    Chance is the share of the largest class.
    """
    train, test = share_classes(train, test)
    num_classes, classes = count_classes(train, test), train.read_classes()
    held_out, truth = pooled_levels(extractor, test, config.batch_size), torch.from_numpy(test.read_classes())
    used, pooled = pooled_rows(extractor, train, draws, config.batch_size)
    scores = []
    for draw in counted(draws, len(draws), "draws of labels"):
        labels = classes[draw.rows]
        folds = stratified_folds(labels, config.folds)
        candidates = []
        for level, features in pooled.items():
            own = features[torch.from_numpy(np.searchsorted(used, draw.rows)).to(features.device)]
            choice = choose_linear(own, torch.from_numpy(labels).to(own.device), folds, num_classes, config)
            value = float((choice.classifier.predict(held_out[level]).cpu() == truth).double().mean())
            settings: dict[str, Any] = {"l2": choice.l2}
            candidates.append(
                Score(extractor.name, level, len(draw.rows), draw.seed, value, choice.selection, settings=settings)
            )
        scores += mark_best(candidates)
        scores.append(_fixed(extractor.name, draw, own, labels, held_out[level], num_classes, config, test))
    return scores


def _fixed(
    extractor: str,
    draw: Draw,
    features: Tensor,
    labels: npt.NDArray[np.int64],
    held_out: Tensor,
    num_classes: int,
    config: ProbeConfig,
    test: LabelledSet,
) -> Score:
    """The score of the last candidate, all levels, with the regularisation that nothing chose.

    Shapes: features (n, D), labels (n,), held-out features (N, D).
    """
    l2, targets = config.l2_fallback, torch.from_numpy(labels).to(features.device)
    classifier = fit_path(features, targets, num_classes, [l2], config.max_iter)[l2]
    probabilities = classifier.logits(held_out).cpu().double().softmax(dim=1)
    return fixed_score(extractor, draw, probabilities, test, {"l2": l2})


def fixed_score(
    extractor: str, draw: Draw, probabilities: Tensor, test: LabelledSet, settings: Mapping[str, Any]
) -> Score:
    """The score of a candidate that nothing chose, with others of the same predictions, which a draw may keep.

    Shapes: probabilities (N, K) of all held-out images, on the CPU; K may be less than the classes of their table.
    """
    truth, metric = torch.from_numpy(test.read_classes()), ClassMetric(test.classes)
    metric.add_all(F.pad(probabilities, (0, len(test.classes) - probabilities.shape[1])), truth)
    found, settings = metric.scores(), dict(settings)
    if draw.keep is not None:
        ShownImages.begin(draw.keep, test).add_classes(probabilities)
        settings["folder"] = draw.keep.name
    value = float((probabilities.argmax(dim=1) == truth).double().mean())
    by_class = {name: dict(shares) for name, shares in found.by_class.items()}
    return Score(
        extractor,
        FIXED,
        len(draw.rows),
        draw.seed,
        value,
        settings=settings,
        others=dict(found.others),
        by_class=by_class,
    )


ALL_LEVELS_READ = frozenset(("l2_grid", "l2_fallback", "folds", "max_iter", "batch_size"))
"""Settings that linear read-outs read."""


def all_levels(config: ProbeConfig) -> str:
    """What the headline of linear read-outs is."""
    return f"all levels together, L2 penalty {config.l2_fallback:g} for all: nothing is chosen"


def pooled_rows(
    extractor: FeatureExtractor, train: LabelledSet, draws: Sequence[Draw], batch_size: int, concatenated: bool = True
) -> tuple[npt.NDArray[np.int64], dict[str, Tensor]]:
    """Pooled features of the rows that any draw uses, computed once.

    Shapes: -> those rows in ascending order (R,), {level: (R, D)}.
    """
    used = np.unique(np.concatenate([draw.rows for draw in draws]))
    return used, pooled_levels(extractor, train.subset(used), batch_size, concatenated)


TASK = Task(
    "probe",
    "from class labels: linear classifier on the pooled features of each level; accuracy",
    Class,
    metric=lambda _num_classes: ACCURACY,
    score=linear_probe,
    reads=ALL_LEVELS_READ,
    headline=all_levels,
)
