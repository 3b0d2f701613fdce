"""Extractors: students, random initialisations, raw pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dtpipe.distill.downstream.extractors import (
    NUM_COSINES,
    FeatureExtractor,
    calibrate_batch_norms,
    patches_and_position,
    position_prior,
    random_initialisation,
    random_student,
    raw_pixels,
    student_extractor,
)
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.student.student import StudentSpec
from dtpipe.manifests.errors import DeviceMemoryError, ShapeError
from parts.labelled import with_classes

SPEC = StudentSpec("resnet10t", 4, (32, 32))


def unlabelled(images: np.ndarray) -> LabelledSet:
    return with_classes(images, [str(idx) for idx in range(len(images))], [0] * len(images))


def test_an_extractor_that_breaks_its_promise_is_refused() -> None:
    flat = FeatureExtractor("flat", lambda batch: {"l2": torch.zeros(len(batch), 4)})
    with pytest.raises(ShapeError, match=r"need \[B, C, h, w\]"):
        flat(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


def test_images_without_room_say_what_to_lower() -> None:
    large = FeatureExtractor("teacher", lambda _images: {"l2": torch.empty(1 << 55)})
    with pytest.raises(
        DeviceMemoryError, match=r"teacher: the device has no memory for 2 images .* eval\.probe\.batch_size"
    ):
        large(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))


def test_raw_pixels_are_block_means() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    levels = raw_pixels()(torch.from_numpy(images))
    assert sorted(levels) == ["l2", "l3"]  # stride 16 and 32 do not fit 8 px
    blocks = images.astype(np.float64).reshape(2, 2, 4, 2, 4, 3).mean(axis=(2, 4)) / 127.5 - 1
    np.testing.assert_allclose(levels["l2"].permute(0, 2, 3, 1).numpy(), blocks, atol=1e-6)


def test_the_position_prior_is_the_same_for_every_image_and_spans_smooth_maps() -> None:
    """By hand: the second cosine over the width is cos(pi (x + 1/2) / w); a half plane is nearly in the span."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), dtype=np.uint8))
    level = position_prior()(images)["l2"]
    assert level.shape == (2, NUM_COSINES, 8, 16) and torch.equal(level[0], level[1])
    np.testing.assert_allclose(level[0, 0, 3], np.cos(np.pi * (np.arange(16) + 0.5) / 16), atol=1e-6)
    design = torch.cat([torch.ones(1, 8, 16), level[0]]).flatten(1).T.double()
    left = (torch.arange(16) < 8).double().expand(8, 16).flatten()
    fitted = design @ torch.linalg.lstsq(design, left[:, None]).solution[:, 0]
    assert bool(((fitted > 0.5) == (left > 0.5)).all())


def test_patches_are_the_pixels_around_a_cell_beside_its_place() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    level = patches_and_position()(torch.from_numpy(images))["l2"]
    assert level.shape == (2, 192 + NUM_COSINES, 4, 4)
    patch = images[1, 2:10, 6:14].astype(np.float64) / 127.5 - 1  # of cell (1, 2), which begins at 4, 8
    np.testing.assert_allclose(level[1, :192, 1, 2].view(3, 8, 8).permute(1, 2, 0), patch, atol=1e-6)
    assert torch.equal(level[:, 192:], position_prior()(torch.from_numpy(images))["l2"])


def test_an_extractor_that_reads_for_itself_gets_the_keys_and_not_the_tasks_images() -> None:
    own = {"1": torch.full((6, 6, 3), 9, dtype=torch.uint8), "3": torch.full((6, 6, 3), 7, dtype=torch.uint8)}
    extractor = FeatureExtractor(
        "own",
        lambda images: {"l0": images.permute(0, 3, 1, 2).float()},
        read=lambda keys: torch.stack([own[key] for key in keys]),
    )
    level = extractor.levels(unlabelled(np.zeros((4, 2, 2, 3), np.uint8)), [3, 1])["l0"]
    assert level.shape == (2, 3, 6, 6) and level[:, 0, 0, 0].tolist() == [7, 9]


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
