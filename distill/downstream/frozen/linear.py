"""Multinomial logistic regression on frozen features, on any device and the same every time.

The objective is scikit-learn's, per sample: mean cross-entropy + l2/2 · ||W||², the bias free of charge, so that
l2 = 1 / (C · n). Features are standardised first; the scaling is folded into the weights that come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from dtpipe.distill.engine.device import as_float64

Vector = npt.NDArray[np.float64]


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
    basis, inside = in_span((features - mean) * scale)  # (D, R), (n, R)
    gram = inside.T @ inside / len(inside)
    shares = torch.bincount(targets, minlength=num_classes) / len(targets)
    curvature = float((shares * (1 - shares)).mean())
    weight = inside.new_zeros(num_classes, inside.shape[1])
    bias = inside.new_zeros(num_classes)
    path = {}
    for l2 in sorted(l2_grid, reverse=True):
        weight, bias = _minimise(inside, targets, weight, bias, l2, _round_units(gram, curvature, l2), max_iter)
        raw_weight = (weight if basis is None else weight @ basis.T) * scale
        path[l2] = LinearClassifier(raw_weight, bias - raw_weight @ mean)
    return path


def in_span(features: Tensor) -> tuple[Tensor | None, Tensor]:
    """Features in the span of the samples, where the solution lies, when there are fewer samples than features.

    Shapes: (n, D) -> orthonormal basis (D, n) and features (n, n); or None and the features (n, D) as they are.
    """
    if len(features) >= features.shape[1]:
        return None, features
    basis, triangle = torch.linalg.qr(features.T)
    return basis, triangle.T


def _round_units(gram: Tensor, curvature: float, l2: float) -> Tensor:
    """Units (R, R) in which the objective curves about equally in all directions: weight = scaled @ units."""
    precise = as_float64(gram)
    identity = torch.eye(len(gram), dtype=torch.float64, device=precise.device)
    factor = torch.linalg.cholesky(curvature * precise + l2 * identity)
    units: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return units.to(gram)


def _minimise(
    features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, l2: float, units: Tensor, max_iter: int
) -> tuple[Tensor, Tensor]:
    """scipy's L-BFGS, in units that make it need tens of iterations, not thousands; features stay on their device."""
    num_classes, size = weight.shape
    truth = F.one_hot(targets, num_classes).to(features.dtype)  # (n, K)

    def unpack(values: Vector) -> tuple[Tensor, Tensor]:
        both = torch.from_numpy(values).to(features).view(num_classes, size + 1)
        return both[:, :size] @ units, both[:, size]

    def objective(values: Vector) -> tuple[float, Vector]:
        own_weight, own_bias = unpack(values)
        log_shares = F.log_softmax(features @ own_weight.T + own_bias, dim=1)
        loss = 0.5 * l2 * own_weight.square().sum() - (truth * log_shares).sum() / len(features)
        residual = (log_shares.exp() - truth) / len(features)
        slope = (residual.T @ features + l2 * own_weight) @ units.T
        return loss.item(), torch.cat([slope, residual.sum(dim=0)[:, None]], dim=1).flatten().cpu().double().numpy()

    start = (
        torch.cat([torch.linalg.solve(units, weight, left=False), bias[:, None]], dim=1)
        .flatten()
        .cpu()
        .double()
        .numpy()
    )
    precise = features.dtype == torch.float64
    options = {"maxiter": max_iter, "gtol": 1e-8 if precise else 1e-5, "ftol": 1e-13 if precise else 1e-7}
    # scipy's BLAS and torch each keep threads that spin while waiting; on few cores they starve each other in turn.
    with torch.no_grad(), threadpool_limits(1, user_api="blas"):
        return unpack(minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x)
