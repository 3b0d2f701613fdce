"""The interpreter's loss against loops in float64 that count pixels one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.labels.losses import interpreter_losses, mean_cross_entropy, soft_dice
from dtpipe.manifests.errors import ShapeError


def example(num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits, and a truth without the last class, with a fifth of the pixels ignored."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(num_classes - 1, (3, 5, 6), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    return 3 * torch.randn(3, num_classes, 5, 6, generator=generator), truth


def shares(logits: Tensor, image: int, row: int, column: int) -> list[float]:
    powers = [math.exp(float(value)) for value in logits[image, :, row, column].double()]
    return [power / sum(powers) for power in powers]


def by_hand(logits: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and soft Dice over the classes that occur."""
    num = logits.shape[1]
    overlap, predicted, there = [0.0] * num, [0.0] * num, [0] * num
    entropy = 0.0
    for image, row, column in torch.nonzero(truth != IGNORE).tolist():
        own, number = shares(logits, image, row, column), int(truth[image, row, column])
        entropy -= math.log(own[number])
        there[number] += 1
        overlap[number] += own[number]
        predicted = [sum(pair) for pair in zip(predicted, own, strict=True)]
    occurring = [number for number in range(num) if there[number]]
    dice = [1 - 2 * overlap[number] / (predicted[number] + there[number]) for number in occurring]
    return entropy / sum(there), sum(dice) / len(dice)


def test_cross_entropy_and_three_times_dice_are_those_of_a_loop_over_pixels() -> None:
    logits, truth = example()
    entropy, dice = by_hand(logits, truth)
    losses = interpreter_losses(logits, truth, 3.0)
    assert float(losses["cross_entropy"]) == pytest.approx(entropy, rel=1e-5)
    assert float(losses["dice"]) == pytest.approx(dice, rel=1e-5)
    assert float(losses["loss"]) == pytest.approx(entropy + 3 * dice, rel=1e-5)


def test_what_is_predicted_on_ignored_pixels_changes_nothing_and_has_no_gradient() -> None:
    logits, truth = example()
    ignored = (truth == IGNORE)[:, None].expand_as(logits)
    other = logits.masked_scatter(ignored, 5 * torch.randn(int(ignored.sum()))).requires_grad_()
    loss = interpreter_losses(other, truth, 3.0)["loss"]
    assert loss.item() == pytest.approx(float(interpreter_losses(logits, truth, 3.0)["loss"]), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, other)
    assert not gradient[ignored].any() and gradient[~ignored].any()


def test_dice_is_0_where_all_is_right_and_the_loss_where_nothing_counts() -> None:
    _, truth = example()
    sure = 100.0 * torch.nn.functional.one_hot(truth.clamp(min=0), 4).permute(0, 3, 1, 2)
    assert float(soft_dice(sure, truth)) == pytest.approx(0, abs=1e-6)
    assert float(soft_dice(-sure, truth)) == pytest.approx(1, abs=1e-6)
    nothing = torch.full_like(truth, IGNORE)
    logits = example()[0].requires_grad_()
    loss = interpreter_losses(logits, nothing, 3.0)["loss"]
    assert loss.item() == 0 and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_classes_have_cross_entropy_alone_and_sizes_must_agree() -> None:
    logits, truth = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    assert float(mean_cross_entropy(logits, truth)) == pytest.approx(expected)
    assert set(interpreter_losses(logits, truth, 3.0)) == {"loss"}
    with pytest.raises(ShapeError, match="bring them to its size"):
        soft_dice(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64))
