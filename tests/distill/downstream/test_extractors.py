"""Extractors: students, random initialisations, raw pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dtpipe.distill.downstream.extractors import (
    FeatureExtractor,
    calibrate_batch_norms,
    random_initialisation,
    random_student,
    raw_pixels,
    student_extractor,
)
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.student.student import StudentSpec
from dtpipe.manifests.errors import ShapeError
from parts.labelled import with_classes

SPEC = StudentSpec("resnet10t", 4, (32, 32))


def unlabelled(images: np.ndarray) -> LabelledSet:
    return with_classes(images, [str(idx) for idx in range(len(images))], [0] * len(images))


def test_an_extractor_that_breaks_its_promise_is_refused() -> None:
    flat = FeatureExtractor("flat", lambda batch: {"l2": torch.zeros(len(batch), 4)})
    with pytest.raises(ShapeError, match=r"need \[B, C, h, w\]"):
        flat(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


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
    calibrate_batch_norms(student, unlabelled(images), batch_size=4)
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
    baseline = random_initialisation(SPEC, unlabelled(images))
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
