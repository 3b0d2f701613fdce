"""Which images a step holds follows from (seed, step, rank) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.tuned.base import Example
from dtpipe.distill.downstream.tuned.batches import BatchOrder
from dtpipe.distill.downstream.tuned.examples import TrainingViews, View
from dtpipe.distill.engine.ranks import ALONE, Ranks
from parts.tuning import bright_halves, tune_config


def steps(order: BatchOrder, ranks: Ranks = ALONE) -> list[list[View]]:
    return [[view for part in order.parts(step, ranks) for view in part.views] for step in range(order.num_steps)]


def test_every_image_is_seen_before_any_is_seen_again_and_batches_have_one_size() -> None:
    views = steps(BatchOrder.of(tune_config(steps=7), 10, seed=0))
    assert [len(step) for step in views] == [4] * 7
    rows = [view.row for step in views for view in step]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20]
    assert [view.passed for step in views for view in step] == [at // 10 for at in range(28)]


@pytest.mark.parametrize(("num", "size", "steps"), [(1, 2, 3), (3, 3, 6), (9, 4, 14)])
def test_epochs_are_passes_and_a_batch_larger_than_the_set_is_the_set(num: int, size: int, steps: int) -> None:
    order = BatchOrder.of(tune_config(steps=None, epochs=6), num, seed=0)
    assert (order.batch_size, order.num_steps) == (size, steps)


def test_repeated_augmentation_shows_an_image_several_times_in_a_batch() -> None:
    views = steps(BatchOrder.of(tune_config(steps=5, batch_size=6, augment={"repeats": 3}), 10, seed=0))
    for step in views:
        assert sorted(Counter(view.row for view in step).values()) == [3, 3]
        assert sorted(view.repeat for view in step) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_ranks_share_a_batch_by_weight(micro_batch: int | None) -> None:
    order = BatchOrder.of(tune_config(batch_size=5, steps=3, micro_batch=micro_batch), 8, seed=1)
    for step in range(3):
        parts = [part for rank in range(2) for part in order.parts(step, Ranks(rank, 2))]
        assert [view for part in parts for view in part.views] == steps(order)[step]
        assert sum(part.weight for part in parts) == pytest.approx(1)
        assert [len(part.views) / 5 for part in parts] == [part.weight for part in parts]


def test_a_rank_without_an_image_repeats_one_with_no_weight() -> None:
    order = BatchOrder.of(tune_config(batch_size=2, steps=1), 8, seed=1)
    weights = [part.weight for rank in range(3) for part in order.parts(0, Ranks(rank, 3))]
    assert weights == [0.5, 0.5, 0.0]


def test_a_view_follows_from_seed_key_and_pass_and_leaves_the_generators_alone() -> None:
    def augment(image, _target):
        return Example(torch.tensor([torch.rand(()).item(), np.random.rand(), float(image.mean())]), {})

    labelled = bright_halves(4, 0)
    views = TrainingViews(labelled, augment, seed=3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = views[View(1, 0)].image
    assert torch.equal(torch.rand(3), expected)
    others = [View(1, 1), View(1, 0, 1), View(2, 0)]
    assert not any(torch.equal(views[view].image, first) for view in others)
    shuffled = TrainingViews(labelled.subset([3, 1]), augment, seed=3)
    assert torch.equal(shuffled[View(1, 0)].image, first)
    assert not torch.equal(TrainingViews(labelled, augment, seed=4)[View(1, 0)].image, first)
