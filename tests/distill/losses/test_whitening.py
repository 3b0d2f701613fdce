"""Statistics of channels against float64 numpy, whitening by the dataset against a loop, and R² against its formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtpipe.distill.config import LossConfig
from dtpipe.distill.losses.features import feature_loss
from dtpipe.distill.losses.fit import with_r2
from dtpipe.distill.losses.whitening import ChannelStatistics, Whitener, whiten


def features(seed: int, num: int, channels: int = 4, offset: float = 0.0) -> torch.Tensor:
    """Channels of different means and scales."""
    rng = np.random.default_rng(seed)
    scales, means = rng.uniform(0.1, 30, (2, channels, 1, 1))
    return torch.from_numpy(rng.standard_normal((num, channels, 3, 5)) * scales + means + offset).float()


def statistics(level: torch.Tensor) -> dict[str, ChannelStatistics]:
    return {"l2": ChannelStatistics.of(level)}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 11), max_size=4), offset=st.sampled_from([0.0, 1e4]))
def test_statistics_of_shards_merge_to_those_of_the_whole(seed, cuts, offset):
    level = features(seed, 12, offset=offset)
    edges = [0, *sorted(set(cuts)), 12]
    parts = [ChannelStatistics.of(level[start:end]) for start, end in pairwise(edges)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    values = level.double().numpy()
    assert merged.num == 12 * 3 * 5
    np.testing.assert_allclose(merged.mean, values.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(merged.variance, values.var(axis=(0, 2, 3)), rtol=1e-9)  # cancels at an offset of 1e4


def test_whitening_by_the_dataset_standardises_each_channel_by_what_all_samples_say():
    level = features(0, 6)
    white = Whitener("dataset", statistics(level))("l2", level[:2].half())
    values = level.numpy().astype(np.float64)
    for sample, channel in np.ndindex(2, 4):
        of_channel = values[:, channel]
        by_hand = (level[sample, channel].half().double().numpy() - of_channel.mean()) / np.sqrt(
            of_channel.var() + 1e-5
        )
        np.testing.assert_allclose(white[sample, channel], by_hand, rtol=1e-4, atol=1e-4)  # float32
    assert white.dtype == torch.float32


def test_a_channel_that_does_not_vary_in_the_dataset_is_whitened_to_nothing():
    level = features(1, 3)
    level[:, 2] = 7.5
    white = Whitener("dataset", statistics(level))("l2", level)
    assert torch.equal(white[:, 2], torch.zeros(3, 3, 5))
    assert torch.isfinite(white).all()


@pytest.mark.parametrize("over", ["layer", "channel", "none"])
def test_whitening_of_samples_takes_nothing_from_the_dataset(over):
    level = features(2, 3)
    assert torch.equal(Whitener(over, statistics(level))("l2", level), whiten(level, over))


def logged(student: torch.Tensor, teacher: torch.Tensor, whitener: Whitener, over: str) -> dict[str, float]:
    """As a run logs it, of one batch in parts of 1, 2 and 3 samples."""
    sums: dict[str, float] = {}
    for start, end in ((0, 1), (1, 3), (3, 6)):
        levels = ({"l2": student[start:end]}, {"l2": teacher[start:end]})
        loss = feature_loss(*levels, LossConfig(whiten=over), whitener=whitener)
        for name, value in {**loss.terms, **loss.levels}.items():
            sums[name] = sums.get(name, 0.0) + value.item() * (end - start) / 6
    return with_r2(sums)


@pytest.mark.parametrize("over", ["layer", "channel", "dataset", "none"])
def test_r2_is_its_formula_and_a_constant_has_0_and_a_perfect_student_1(over):
    dataset, teacher = features(3, 40), features(3, 40)[:6]
    known = statistics(whiten(dataset, over))
    whitener = Whitener(over, known)
    white = whitener("l2", teacher)
    mean = torch.zeros(4) if over == "dataset" else known["l2"].mean.float()
    constant = mean[None, :, None, None].expand_as(teacher)
    generator = torch.Generator().manual_seed(0)
    student = constant + 0.3 * (white - constant) + 0.1 * torch.randn(white.shape, generator=generator)
    error = np.square(student.double().numpy() - white.double().numpy()).sum()
    spread = np.square(white.double().numpy() - constant.double().numpy()).sum()
    found = logged(student, teacher, whitener, over)
    assert found["r2/l2"] == pytest.approx(1 - error / spread, rel=1e-4)  # float32
    assert "spread/l2" not in found
    assert logged(white, teacher, whitener, over)["r2/l2"] == 1
    assert logged(constant, teacher, whitener, over)["r2/l2"] == pytest.approx(0, abs=1e-12)


def test_r2_needs_a_regression_a_dataset_and_a_level_that_varies():
    level = {"l2": features(4, 2)}
    known = Whitener("layer", statistics(level["l2"]))
    assert "r2/l2" not in with_r2(dict.fromkeys(feature_loss(level, level, LossConfig()).levels, 1.0))
    angles = LossConfig(mse_weight=0, cosine_weight=1)
    assert not [name for name in feature_loss(level, level, angles, whitener=known).levels if "spread" in name]
    assert with_r2({"mse/l2": 0.5, "spread/l2": 0.0, "loss": 1.0}) == {"mse/l2": 0.5, "loss": 1.0}
