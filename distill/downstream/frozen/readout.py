"""Dense read-out: a linear classifier per cell on frozen levels, brought to one stride; scored by IoU.

Candidates are each level alone and all of them concatenated. Few cells are kept while fitting (`max_cells`), and
held-out images pass once, batch by batch, through all classifiers, so memory does not grow with either set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor, row_batches
from dtpipe.distill.downstream.frozen.linear import LinearClassifier, fit_path
from dtpipe.distill.downstream.frozen.probe import all_levels
from dtpipe.distill.downstream.frozen.ranking import ForegroundRanking
from dtpipe.distill.downstream.frozen.shown import ShownImages
from dtpipe.distill.downstream.labelled import IGNORE, Draw, LabelledSet, count_classes
from dtpipe.distill.downstream.result import ALL_LEVELS, FIXED, FOREGROUND_AP, Score, mark_best
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.labels import Mask
from dtpipe.manifests.phases import counted
from dtpipe.manifests.words import count_of

FOREGROUND_IOU = "foreground IoU"
MEAN_IOU = "mIoU"


def masks_at_stride(masks: Tensor, stride: int, num_classes: int) -> Tensor:
    """Each cell's most frequent class; ties go to the lower class, and a mostly ignored cell is ignored.

    Shapes: masks (B, H, W) integers -> (B, H/stride, W/stride) int64.
    Raises: ShapeError when the stride does not divide the mask.
    """
    if masks.shape[1] % stride or masks.shape[2] % stride:
        raise ShapeError(
            f"masks are {tuple(masks.shape[1:])} px, which stride {stride} does not divide; choose another stride"
        )
    values = [*range(num_classes), IGNORE]
    shares = torch.stack(
        [F.avg_pool2d((masks == value).float()[:, None], stride)[:, 0] for value in values]
    )  # (K+1, B, h, w)
    return torch.tensor(values, device=masks.device)[shares.argmax(dim=0)]


def at_grid(level: Tensor, grid: Sequence[int]) -> Tensor:
    """A level on the read-out's grid: bilinear where it is coarser, area average where it is finer.

    Linear in the channels, so a per-cell classifier may be applied before or after.

    Shapes: (B, C, h, w) -> (B, C, *grid).
    """
    grid = (grid[0], grid[1])
    if tuple(level.shape[-2:]) == grid:
        return level
    if level.shape[-2] > grid[0]:
        return F.adaptive_avg_pool2d(level, grid)
    return F.interpolate(level, size=grid, mode="bilinear", align_corners=False)


def confusion_matrix(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts of (true, predicted) pairs; ignored cells are left out. Any equal shapes -> (K, K) int64 on the CPU."""
    known = truth != IGNORE
    pairs = truth[known] * num_classes + predicted[known]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).cpu()


def iou_by_class(confusion: Tensor) -> Tensor:
    """Intersection over union of each class; NaN where it is neither there nor predicted.

    Shapes: (K, K) -> (K,) float64.
    """
    hits = confusion.diagonal().double()
    return hits / (confusion.sum(dim=0) + confusion.sum(dim=1) - hits)


def iou_score(confusion: Tensor) -> float:
    """Foreground IoU of two classes; of more, the mean over those that are there or predicted, background included."""
    ious = iou_by_class(confusion)
    chosen = ious[1:] if len(ious) == 2 else ious[~ious.isnan()]
    return float(chosen.nan_to_num(0.0).mean())


@dataclass(frozen=True)
class Cells:
    """The n labelled cells of one draw."""

    features: dict[str, Tensor]
    """(n, C) by level."""
    targets: Tensor
    """(n,) classes."""
    image_idx: Tensor
    """(n,): which image a cell is of."""
    turn: Tensor
    """(n,): its turn among the cells of that image."""


def draw_cells(
    extractor: FeatureExtractor, labelled: LabelledSet, num_classes: int, seed: int, config: ProbeConfig
) -> Cells:
    """Up to `max_cells` cells that count, equally many random ones of every labelled image.

    Raises: ConfigError where all are ignored.
    """
    quota = max(1, config.max_cells // len(labelled))
    generator = torch.Generator().manual_seed(seed)
    features: dict[str, list[Tensor]] = {}
    places: list[Tensor] = []  # per image (3, cells): target, image, turn
    for rows, levels, truth in _with_cells(extractor, labelled, num_classes, config):
        for offset, target in enumerate(truth.flatten(1)):
            known = torch.nonzero(target != IGNORE)[:, 0]
            cells = known[torch.randperm(len(known), generator=generator)[:quota]]
            for name, level in levels.items():
                features.setdefault(name, []).append(_at_cells(level[offset], truth.shape[1:], cells))
            image = torch.full_like(cells, rows[offset])
            places.append(torch.stack([target[cells], image, torch.arange(len(cells))]))
    if not any(place.shape[1] for place in places):
        raise ConfigError(
            f"every cell of {count_of(len(labelled), 'labelled mask')} is mostly ignored, so there is nothing to learn "
            "from; label more images, or give other masks"
        )
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    targets, image_idx, turn = torch.cat(places, dim=1).to(next(iter(joined.values())).device)
    return Cells(joined, targets, image_idx, turn)


def _with_cells(
    extractor: FeatureExtractor, labelled: LabelledSet, num_classes: int, config: ProbeConfig
) -> Iterator[tuple[range, dict[str, Tensor], Tensor]]:
    """Batches of a set: its rows, their levels, and the class of each cell, (B, H/stride, W/stride) on the CPU."""
    for rows in row_batches(labelled, config.batch_size):
        masks, size = labelled.read_masks(rows), labelled.image(rows[0]).shape[:2]
        if size != masks.shape[1:]:
            raise ShapeError(
                f"masks are {tuple(masks.shape[1:])}, images {size}; masks must have the images' height and width"
            )
        yield rows, extractor.levels(labelled, rows), masks_at_stride(masks, config.stride, num_classes)


def _at_cells(level: Tensor, grid: Sequence[int], cells: Tensor) -> Tensor:
    """Features of some cells of one image. Shapes: level (C, h, w), cells (n,) -> (n, C)."""
    return at_grid(level[None], grid)[0].flatten(1)[:, cells.to(level.device)].T


@dataclass(frozen=True)
class Readout:
    """A classifier on some levels: one weight (K, C) per level, and a bias (K,)."""

    weights: Mapping[str, Tensor]
    bias: Tensor

    def logits(self, levels: Mapping[str, Tensor], grid: Sequence[int]) -> Tensor:
        """How likely each class of each cell is; logits are formed at each level's own size.

        Shapes: {level: (B, C, h, w)} -> (B, K, *grid).
        """
        parts = [
            at_grid(torch.einsum("kc,bchw->bkhw", weight, levels[name]), grid) for name, weight in self.weights.items()
        ]
        return torch.stack(parts).sum(dim=0) + self.bias[:, None, None]


@dataclass(frozen=True)
class Fitted:
    """A read-out ready to be scored: where it comes from, and what the labelled images said of it."""

    draw: Draw
    level: str
    readout: Readout
    l2: float
    selection: float | None = None


def fit_readouts(cells: Cells, draw: Draw, num_classes: int, config: ProbeConfig) -> list[Fitted]:
    """A read-out of each level and one of all, each with the regularisation that whole images left out prefer; last the
    fixed one, of all with a regularisation that nothing chose.
    """
    candidates = {name: [name] for name in cells.features}
    if len(candidates) > 1:
        candidates[ALL_LEVELS] = list(cells.features)
    fitted = []
    for candidate, names in candidates.items():
        features = torch.cat([cells.features[name] for name in names], dim=1)
        l2, selection = _choose_l2(features, cells, len(draw.rows), num_classes, config)
        classifier = fit_path(features, cells.targets, num_classes, [l2], config.max_iter)[l2]
        readout = _split(classifier, {name: cells.features[name].shape[1] for name in names})
        fitted.append(Fitted(draw, candidate, readout, l2, selection))
    last, l2 = fitted[-1], config.l2_fallback
    if last.l2 != l2:
        classifier = fit_path(features, cells.targets, num_classes, [l2], config.max_iter)[l2]
        last = Fitted(draw, last.level, _split(classifier, {name: cells.features[name].shape[1] for name in names}), l2)
    return [*fitted, replace(last, level=FIXED, selection=None)]


def _split(classifier: LinearClassifier, widths: Mapping[str, int]) -> Readout:
    parts = torch.split(classifier.weight, list(widths.values()), dim=1)
    return Readout(dict(zip(widths, parts, strict=True)), classifier.bias)


def _choose_l2(
    features: Tensor, cells: Cells, num_images: int, num_classes: int, config: ProbeConfig
) -> tuple[float, float | None]:
    num_folds = min(config.folds, num_images)
    if num_folds < 2:
        return config.l2_fallback, None
    few = cells.turn < max(1, config.max_select_cells // num_images)
    features, targets, fold_of = features[few], cells.targets[few], cells.image_idx[few] % num_folds
    confusions = {
        l2: torch.zeros(num_classes, num_classes, dtype=torch.int64) for l2 in sorted(config.l2_grid, reverse=True)
    }
    for fold in range(num_folds):
        held = fold_of == fold
        path = fit_path(features[~held], targets[~held], num_classes, config.l2_grid, config.max_iter)
        for l2, classifier in path.items():
            confusions[l2] += confusion_matrix(targets[held], classifier.predict(features[held]), num_classes)
    scores = {l2: iou_score(confusion) for l2, confusion in confusions.items()}
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def dense_readout(
    extractor: FeatureExtractor, train: LabelledSet, test: LabelledSet, draws: Sequence[Draw], config: ProbeConfig
) -> list[Score]:
    """Held-out IoU of every level in every draw, the best level of each draw marked, and of the fixed candidate.

    Of two classes, the fixed candidate's foreground AP stands beside it. Its masks are kept where the draw says so.
    """
    num_classes = count_classes(train, test)
    fitted = []
    for draw in counted(draws, len(draws), "draws of labels"):
        cells = draw_cells(extractor, train.subset(draw.rows), num_classes, draw.seed, config)
        fitted.append(fit_readouts(cells, draw, num_classes, config))
    seen = iter(_held_out(extractor, test, list(chain(*fitted)), num_classes, config))
    scores = []
    for candidates in fitted:
        *chosen, fixed = [_score(extractor.name, candidate, next(seen)) for candidate in candidates]
        scores += [*mark_best(chosen), fixed]
    return scores


@dataclass(frozen=True)
class HeldOutCells:
    """What one read-out said of all held-out cells."""

    confusion: Tensor
    """(K, K)"""
    ranking: ForegroundRanking | None
    """Of the fixed candidate of two classes."""
    shown: ShownImages | None
    """Of the fixed candidate of a draw that keeps some."""


def _score(extractor: str, fitted: Fitted, seen: HeldOutCells) -> Score:
    confusion = seen.confusion
    ious = [None if iou != iou else iou for iou in iou_by_class(confusion).tolist()]  # NaN is not JSON
    settings: dict[str, Any] = {"l2": fitted.l2, "iou_by_class": ious}
    if seen.shown is not None:
        settings["folder"] = seen.shown.folder.name
    draw, precision = fitted.draw, seen.ranking.average_precision() if seen.ranking else None
    return Score(
        extractor,
        fitted.level,
        len(draw.rows),
        draw.seed,
        iou_score(confusion),
        fitted.selection,
        settings=settings,
        others={} if precision is None else {FOREGROUND_AP: precision},
    )


def _held_out(
    extractor: FeatureExtractor, test: LabelledSet, fitted: Sequence[Fitted], num_classes: int, config: ProbeConfig
) -> list[HeldOutCells]:
    """What each read-out says of all held-out images, in one pass."""
    results = [_unseen(candidate, test, num_classes) for candidate in fitted]
    for rows, levels, truth in _with_cells(extractor, test, num_classes, config):
        truth = truth.to(next(iter(levels.values())).device)
        for seen, candidate in zip(results, fitted, strict=True):
            logits = candidate.readout.logits(levels, truth.shape[1:])
            predicted = logits.argmax(dim=1)
            seen.confusion.add_(confusion_matrix(truth, predicted, num_classes))
            if seen.shown is not None:
                seen.shown.add_masks(rows, predicted, config.stride)
            if seen.ranking is not None:
                seen.ranking.add(truth, logits[:, 1] - logits[:, 0])
    return results


def _unseen(fitted: Fitted, test: LabelledSet, num_classes: int) -> HeldOutCells:
    fixed, folder = fitted.level == FIXED, fitted.draw.keep
    return HeldOutCells(
        torch.zeros(num_classes, num_classes, dtype=torch.int64),
        ForegroundRanking() if fixed and num_classes == 2 else None,
        ShownImages.begin(folder, test) if fixed and folder is not None else None,
    )


TASK = Task(
    "readout",
    "from masks: linear classifier per cell on the levels; foreground IoU, or mIoU of several classes",
    Mask,
    metric=lambda num_classes: FOREGROUND_IOU if num_classes == 2 else MEAN_IOU,
    score=dense_readout,
    reads=frozenset(
        ("l2_grid", "l2_fallback", "folds", "max_iter", "batch_size", "stride", "max_cells", "max_select_cells")
    ),
    headline=all_levels,
)
