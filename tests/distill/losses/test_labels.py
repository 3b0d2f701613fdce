"""Equations (5) and (6) in float64 by hand, and as sums over parts of a batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from dtpipe.distill.config import LabelsConfig
from dtpipe.distill.labels.targets import Targets
from dtpipe.distill.losses.features import feature_loss
from dtpipe.distill.losses.labels import label_loss, mixed_losses
from dtpipe.manifests.errors import ShapeError
from parts.memory import level_spec, tiny_config
from parts.soft_labels import CLASSES, LABELS

B, K, H, W = 3, 5, 4, 2


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (B, K, H, W))


def softened(values: np.ndarray, tau: float) -> list[float]:
    exponents = [math.exp(value / tau) for value in values]
    return [exponent / sum(exponents) for exponent in exponents]


def by_hand(student: np.ndarray, teacher: np.ndarray, tau: float, confidence: float = 0.0) -> float:
    """Position by position, in float64."""
    total = 0.0
    for b in range(B):
        for y in range(H):
            for x in range(W):
                of_teacher, of_student = softened(teacher[b, :, y, x], tau), softened(student[b, :, y, x], tau)
                if max(softened(teacher[b, :, y, x], 1.0)) >= confidence:
                    total -= sum(p * math.log(q) for p, q in zip(of_teacher, of_student, strict=True))
    return total / (B * H * W)


def as_tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).float() for array in arrays]


@pytest.mark.parametrize("tau", [4.0, 1.0])
def test_it_is_the_cross_entropy_of_softened_distributions_without_tau_squared(tau):
    """float32 against float64: 1e-6 relative."""
    loss = label_loss(*as_tensors(logits(0), logits(1)), LabelsConfig(temperature=tau))
    assert_allclose(loss.total.item(), by_hand(logits(0), logits(1), tau), rtol=1e-6)
    assert loss.kept == 1


def test_the_default_temperature_is_the_papers():
    assert LabelsConfig().temperature == 4
    loss = label_loss(*as_tensors(logits(0), logits(1)), LabelsConfig())
    assert_allclose(loss.total.item(), by_hand(logits(0), logits(1), 4.0), rtol=1e-6)


def test_positions_that_are_not_sure_at_temperature_one_teach_nothing():
    student, teacher = as_tensors(logits(0), logits(1))
    student.requires_grad_()
    loss = label_loss(student, teacher, LabelsConfig(confidence=0.9))
    assert_allclose(loss.total.item(), by_hand(logits(0), logits(1), 4.0, 0.9), rtol=1e-6)
    loss.total.backward()
    sure = teacher.softmax(dim=1).amax(dim=1) >= 0.9
    assert 0 < sure.float().mean() < 1
    assert student.grad is not None
    assert torch.equal(student.grad.abs().sum(dim=1) > 0, sure)
    assert loss.kept == sure.float().mean()


def test_classes_that_a_top_k_leaves_out_have_no_share():
    """Their logits are -inf where it is decoded so."""
    teacher = logits(1)
    teacher[:, 2:] = -np.inf
    finite = label_loss(*as_tensors(logits(0), np.where(np.isinf(teacher), -1e9, teacher)), LabelsConfig())
    loss = label_loss(*as_tensors(logits(0), teacher), LabelsConfig())
    assert_allclose(loss.total.item(), finite.total.item(), rtol=1e-6)


@pytest.mark.parametrize("confidence", [None, 0.8])
def test_parts_of_a_batch_add_up(confidence):
    student, teacher = as_tensors(logits(0), logits(1))
    config = LabelsConfig(confidence=confidence)
    parts = sum(
        len(student[part]) / B * label_loss(student[part], teacher[part], config).total
        for part in (slice(0, 1), slice(1, 3))
    )
    assert_allclose(parts, label_loss(student, teacher, config).total, rtol=1e-6)


def test_other_classes_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 5, 4, 2\), the soft labels \(3, 4, 4, 2\)"):
        label_loss(torch.zeros(3, 5, 4, 2), torch.zeros(3, 4, 4, 2), LabelsConfig())


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_mix_is_the_sum_of_both_by_weight(tmp_path: Path, weight):
    """Equation (6)."""
    level, config = level_spec("l3", 8, 4), tiny_config(tmp_path)
    generator = torch.Generator().manual_seed(0)
    sizes = {"l3": (2, 4, 4, 4), LABELS.name: (2, len(CLASSES), 4, 4)}
    student, teacher = (
        {name: torch.randn(size, generator=generator) for name, size in sizes.items()} for _ in range(2)
    )
    mix = mixed_losses(student, teacher, Targets((level,), LABELS, CLASSES, weight), config)
    features = feature_loss({"l3": student["l3"]}, {"l3": teacher["l3"]}, config.loss)
    labels = label_loss(student[LABELS.name], teacher[LABELS.name], config.labels)
    assert_allclose(mix["loss"], features.total + weight * labels.total, rtol=1e-6)
    assert (mix["labels"], mix["mse"]) == (labels.total, features.terms["mse"])
    alone = mixed_losses(student, teacher, Targets((), LABELS, CLASSES, weight), config)
    assert_allclose(alone["loss"], weight * labels.total, rtol=1e-6)
    assert "mse" not in alone
