"""Labelled sets, draws and extractors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm

from dtpipe.distill.downstream.base import (
    IGNORE,
    FeatureExtractor,
    LabelledSet,
    calibrate_batch_norms,
    check_apart,
    draw_labelled,
    random_initialisation,
    random_student,
    raw_pixels,
    student_extractor,
)
from dtpipe.distill.student.student import StudentSpec
from dtpipe.manifests.errors import ConfigError, ShapeError

SPEC = StudentSpec("resnet10t", 4, (32, 32))


def make_set(num: int, num_classes: int = 3, px: int = 8) -> LabelledSet:
    rng = np.random.default_rng(num)
    images = rng.integers(0, 256, (num, px, px, 3), dtype=np.uint8)
    return LabelledSet(images, tuple(f"{idx:04d}.png" for idx in range(num)), labels=np.arange(num) % num_classes)


@settings(deadline=None, max_examples=30)
@given(num=st.integers(3, 30), seed=st.integers(0, 99))
def test_balanced_draws_differ_by_at_most_one_and_nest(num: int, seed: int) -> None:
    labelled = make_set(30)
    rows = draw_labelled(labelled, num, seed, balanced=True)
    counts = np.bincount(labelled.labels[rows], minlength=3)
    assert len(set(rows.tolist())) == num
    assert counts.max() - counts.min() <= 1
    larger = draw_labelled(labelled, 30, seed, balanced=True)
    np.testing.assert_array_equal(larger[:num], rows)


def test_draw_depends_on_keys_not_on_their_order() -> None:
    labelled = make_set(20)
    shuffled = labelled.subset(np.random.default_rng(0).permutation(20))
    first = [labelled.keys[row] for row in draw_labelled(labelled, 6, 5, balanced=True)]
    second = [shuffled.keys[row] for row in draw_labelled(shuffled, 6, 5, balanced=True)]
    assert first == second
    assert first != [labelled.keys[row] for row in draw_labelled(labelled, 6, 6, balanced=True)]


def test_draws_that_cannot_be_made_are_refused() -> None:
    labelled = make_set(9)
    with pytest.raises(ConfigError, match="2 labelled images cannot cover 3 classes"):
        draw_labelled(labelled, 2, 0, balanced=True)
    with pytest.raises(ConfigError, match="10 labelled images are asked for and there are 9"):
        draw_labelled(labelled, 10, 0, balanced=False)
    with pytest.raises(ConfigError, match="both labelled for training and held out"):
        check_apart(labelled, labelled.subset([3]))


def test_parts_that_do_not_fit_are_refused() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ShapeError, match="masks must have"):
        LabelledSet(images, ("a", "b"), masks=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(ConfigError, match="unique"):
        LabelledSet(images, ("a", "a"))
    with pytest.raises(ShapeError, match=r"need \[B, C, h, w\]"):
        FeatureExtractor("flat", lambda batch: {"l2": torch.zeros(len(batch), 4)})(torch.from_numpy(images))


def test_foreground_keeps_ignored_pixels() -> None:
    masks = np.array([[[0, 3], [IGNORE, 1]]], np.uint8)
    labelled = LabelledSet(np.zeros((1, 2, 2, 3), np.uint8), ("a",), masks=masks)
    np.testing.assert_array_equal(labelled.foreground().masks, [[[0, 1], [IGNORE, 1]]])


def test_raw_pixels_are_block_means() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    levels = raw_pixels()(torch.from_numpy(images))
    assert sorted(levels) == ["l2", "l3"]  # stride 16 and 32 do not fit 8 px
    blocks = images.astype(np.float64).reshape(2, 2, 4, 2, 4, 3).mean(axis=(2, 4)) / 127.5 - 1
    np.testing.assert_allclose(levels["l2"].permute(0, 2, 3, 1).numpy(), blocks, atol=1e-6)


def test_calibrated_norms_hold_the_statistics_of_the_images() -> None:
    images = np.random.default_rng(1).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    student = random_student(SPEC, seed=0)
    seen: list[torch.Tensor] = []
    first = next(module for module in student.modules() if isinstance(module, _BatchNorm))
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    calibrate_batch_norms(student, images, batch_size=4)
    hook.remove()
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in seen]).mean(dim=0)
    variances = torch.stack([batch.var(dim=(0, 2, 3)) for batch in seen]).mean(dim=0)
    torch.testing.assert_close(first.running_mean, means)
    torch.testing.assert_close(first.running_var, variances)
    assert not student.training
    assert first.momentum == 0.1


def test_random_initialisation_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    images = np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    state = torch.get_rng_state()
    baseline = random_initialisation(SPEC, images)
    batch = torch.from_numpy(images)
    once, again, other = (baseline.make(seed)(batch)["l3"] for seed in (0, 0, 1))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    assert not torch.equal(once, other)
    assert torch.equal(state, torch.get_rng_state())


def test_student_levels_are_named_by_stride_at_any_image_size() -> None:
    levels = student_extractor(random_student(SPEC, 0))(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert {name: tuple(level.shape[-2:]) for name, level in levels.items()} == {
        "l2": (8, 8),
        "l3": (4, 4),
        "l4": (2, 2),
        "l5": (1, 1),
    }
