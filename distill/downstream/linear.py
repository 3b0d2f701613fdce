"""Multinomial logistic regression on frozen features, on any device and the same every time.

The objective is scikit-learn's, per sample: mean cross-entropy + l2/2 · ||W||², the bias free of charge, so that
l2 = 1 / (C · n). Features are standardised first; the scaling is folded into the weights that come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LinearClassifier:
    """Weight (K, D) and bias (K,) that act on features as they are, before any scaling."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (n, D) -> (n, K)."""
        return features @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """Most likely class. Shapes: (n, D) -> (n,) int64."""
        return self.logits(features).argmax(dim=1)


def fit_path(
    features: Tensor, targets: Tensor, num_classes: int, l2_grid: Sequence[float], max_iter: int = 100
) -> dict[float, LinearClassifier]:
    """One classifier per regularisation, each started from the next stronger one.

    Shapes: features (n, D) floating point, targets (n,) int64 below `num_classes`, on one device.
    """
    mean = features.mean(dim=0)
    std = features.std(dim=0, correction=0)
    # A feature that never changes says nothing; dividing by its rounding error would make it the loudest.
    scale = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.inf).reciprocal()
    scaled = (features - mean) * scale
    weight = scaled.new_zeros(num_classes, scaled.shape[1])
    bias = scaled.new_zeros(num_classes)
    path = {}
    for l2 in sorted(l2_grid, reverse=True):
        weight, bias = _minimise(scaled, targets, weight, bias, l2, max_iter)
        raw_weight = weight * scale
        path[l2] = LinearClassifier(raw_weight, bias - raw_weight @ mean)
    return path


def _minimise(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, l2: float, max_iter: int) -> tuple[Tensor, Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, targets) + 0.5 * l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
