"""The linear classifier against scikit-learn's, which minimises the same objective with another solver."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from dtpipe.distill.downstream.frozen.linear import fit_path


def blobs(num_classes: int, num: int = 120, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num_classes)
    labels = np.arange(num) % num_classes
    centres = rng.normal(size=(num_classes, dim))
    return centres[labels] * 1.5 + rng.normal(size=(num, dim)) * rng.uniform(0.5, 20, dim) + 100, labels


def test_multinomial_agrees_with_scikit_learn() -> None:
    features, labels = blobs(4)
    scaler = StandardScaler().fit(features)
    for l2 in (1e-1, 1e-3):
        theirs = LogisticRegression(C=1 / (l2 * len(features)), tol=1e-10, max_iter=5000).fit(
            scaler.transform(features), labels
        )
        ours = fit_path(torch.from_numpy(features), torch.from_numpy(labels), 4, [1.0, 1e-1, 1e-2, 1e-3], max_iter=500)[
            l2
        ]
        probabilities = ours.logits(torch.from_numpy(features)).softmax(dim=1).numpy()
        # Both stop at a gradient near 1e-6; the flattest direction has curvature l2, hence about 1e-6 / l2.
        np.testing.assert_allclose(
            probabilities, theirs.predict_proba(scaler.transform(features)), atol=2e-3 if l2 < 1e-2 else 2e-5
        )


def test_two_classes_agree_with_scikit_learns_sigmoid() -> None:
    features, labels = blobs(2)
    scaler = StandardScaler().fit(features)
    l2 = 0.05  # w1 = -w0 = w/2 costs l2/2 * |w|^2/2: half of the sigmoid's penalty
    theirs = LogisticRegression(C=2 / (l2 * len(features)), tol=1e-10, max_iter=5000).fit(
        scaler.transform(features), labels
    )
    ours = fit_path(torch.from_numpy(features), torch.from_numpy(labels), 2, [l2], max_iter=500)[l2]
    probabilities = ours.logits(torch.from_numpy(features)).softmax(dim=1).numpy()
    np.testing.assert_allclose(probabilities, theirs.predict_proba(scaler.transform(features)), atol=2e-5)


def test_feature_that_never_changes_gets_no_weight() -> None:
    features, labels = blobs(3)
    features[:, 2] = 0.1  # not exact in binary, so its computed deviation is not exactly zero
    fitted = fit_path(torch.from_numpy(features).float(), torch.from_numpy(labels), 3, [1e-2])[1e-2]
    assert fitted.weight[:, 2].abs().max() == 0
    assert torch.isfinite(fitted.weight).all()


def test_fit_is_equal_every_time() -> None:
    features, labels = blobs(3)
    fits = [
        fit_path(torch.from_numpy(features).float(), torch.from_numpy(labels), 3, [1e-1, 1e-3])[1e-3] for _ in range(2)
    ]
    assert torch.equal(fits[0].weight, fits[1].weight)
