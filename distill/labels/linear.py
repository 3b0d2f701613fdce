"""A rival of the interpreter: a linear read-out of the same features, a logistic regression.

Of masks, one per cell of the finest level, to which the others are brought, and its logits then go to the image's size:
a 1x1 convolution. Of classes, on the mean of each level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.frozen.linear import LinearClassifier, fit_path
from dtpipe.distill.downstream.frozen.readout import at_grid
from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.labels.arms import ArmPrediction, Predict, class_prediction, mask_prediction
from dtpipe.distill.labels.config import RivalsConfig
from dtpipe.distill.labels.data import LabelledFeatures
from dtpipe.distill.student.blocks import resize
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class
from dtpipe.manifests.phases import phase

LINEAR = "linear read-out"


@dataclass(frozen=True)
class _Cells:
    """Cells of labelled images, or whole images."""

    features: Tensor
    """(n, D)"""
    targets: Tensor
    """(n,)"""
    images: Tensor
    """(n,): which image each is of."""


def fit_linear(config: RivalsConfig, train: LabelledFeatures, seed: int, device: torch.device) -> Predict:
    """Fit it on the first reading of each image, unflipped; two folds of the images choose its regularisation.

    Raises: ConfigError where no cell of the masks counts.
    """
    num = len(train.labelled.classes)
    with phase(f"fitting the {LINEAR}"):
        cells = _draw_cells(config, train, seed, device)
        chosen = _choose_l2(config, cells, num)
        classifier = fit_path(cells.features, cells.targets, num, [l2 for l2 in config.l2_grid if l2 >= chosen])[chosen]
    of_masks = train.labelled.kind is not Class

    @torch.inference_mode()
    def predict(levels: Mapping[str, Tensor], size: tuple[int, int]) -> ArmPrediction:
        if not of_masks:
            return class_prediction(classifier.logits(_pooled(levels))[0])
        joined = _joined(levels)
        logits = F.conv2d(joined, classifier.weight[:, :, None, None], classifier.bias)
        return mask_prediction(resize(logits, size)[0])

    return predict


def _joined(levels: Mapping[str, Tensor]) -> Tensor:
    """All levels on the grid of the finest. Shapes: {level: (B, C, h, w)} -> (B, sum of C, H, W)."""
    finest = max((level.shape[-2:] for level in levels.values()), key=lambda grid: grid[0] * grid[1])
    return torch.cat([at_grid(levels[name], finest) for name in sorted(levels)], dim=1)


def _pooled(levels: Mapping[str, Tensor]) -> Tensor:
    """The mean of each level. Shapes: {level: (B, C, h, w)} -> (B, sum of C)."""
    return torch.cat([levels[name].mean(dim=(2, 3)) for name in sorted(levels)], dim=1)


def _draw_cells(config: RivalsConfig, train: LabelledFeatures, seed: int, device: torch.device) -> _Cells:
    """Up to `max_cells` that count, as many random ones of every image. Raises: ConfigError where none does."""
    quota, generator = max(1, config.max_cells // len(train)), torch.Generator().manual_seed(seed)
    features, targets, images = [], [], []
    for row in range(len(train)):
        levels = {name: values[None] for name, values in train.read(row, 0, False).items()}
        truth = train.target(row)
        if truth.ndim == 0:
            own, own_truth = _pooled(levels), truth[None]
        else:
            joined = _joined(levels)
            own_truth = majority(truth, joined.shape[-2:], len(train.labelled.classes)).flatten()
            own = joined[0].flatten(1).T
        known = torch.nonzero(own_truth != IGNORE)[:, 0]
        cells = known[torch.randperm(len(known), generator=generator)[:quota]]
        features.append(own[cells].to(device))
        targets.append(own_truth[cells].to(device))
        images.append(torch.full((len(cells),), row, device=device))
    if not any(map(len, targets)):
        raise ConfigError(
            "every cell of the labelled masks is mostly ignored, so the linear read-out has nothing to learn from; "
            "give other masks, or leave it out with -s interpret.rivals.linear=false"
        )
    return _Cells(torch.cat(features), torch.cat(targets), torch.cat(images))


def majority(mask: Tensor, grid: tuple[int, int] | torch.Size, num_classes: int) -> Tensor:
    """Each cell's most frequent class; of equals the lower one, and a mostly ignored cell is ignored.

    Shapes: (H, W) int64 -> grid, int64.
    """
    values = [*range(num_classes), IGNORE]
    shares = torch.stack(
        [F.adaptive_avg_pool2d((mask == value).float()[None, None], (grid[0], grid[1]))[0, 0] for value in values]
    )
    return torch.tensor(values)[shares.argmax(dim=0)]


def _choose_l2(config: RivalsConfig, cells: _Cells, num_classes: int) -> float:
    """The regularisation whose cross-entropy on the other half of the images is least; the middle one of one image."""
    grid = sorted(config.l2_grid, reverse=True)
    halves = [cells.images % 2 == fold for fold in (0, 1)]
    if len(grid) == 1 or not all(half.any() for half in halves):
        return grid[len(grid) // 2]
    losses = dict.fromkeys(grid, 0.0)
    for held_out in halves:
        path = fit_path(cells.features[~held_out], cells.targets[~held_out], num_classes, grid)
        for l2, classifier in path.items():
            losses[l2] += _loss(classifier, cells.features[held_out], cells.targets[held_out])
    return min(grid, key=lambda l2: losses[l2])


def _loss(classifier: LinearClassifier, features: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(classifier.logits(features), targets, reduction="sum"))
