"""Shapes of the regressor, and its parts against hand-written ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.regressor import FeatureRegressor, PyramidPooling, TargetLevel
from dtpipe.manifests.errors import ShapeError

STRIDES, CHANNELS = (4, 8, 16, 32), (6, 8, 10, 12)


def student_levels(height: int = 64, width: int = 96, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, c, height // s, width // s, generator=generator) for s, c in zip(STRIDES, CHANNELS, strict=True)]


def targets(*levels: tuple[str, int, int, tuple[int, int]]) -> list[TargetLevel]:
    return [TargetLevel(*level) for level in levels]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("ppm", [True, False])
def test_each_target_gets_its_channels_and_size(norm, ppm):
    wanted = targets(("l2", 4, 20, (16, 24)), ("l3", 8, 24, (8, 12)), ("l5", 32, 28, (2, 3)), ("l3.b", 8, 5, (8, 12)))
    regressor = FeatureRegressor(STRIDES, CHANNELS, wanted, RegressorConfig(width=16, norm=norm, ppm=ppm))
    out = regressor(student_levels())
    assert {name: tuple(level.shape) for name, level in out.items()} == {
        "l2": (2, 20, 16, 24),
        "l3": (2, 24, 8, 12),
        "l5": (2, 28, 2, 3),
        "l3.b": (2, 5, 8, 12),
    }


def test_levels_of_another_size_are_resized_to_the_teachers():
    regressor = FeatureRegressor(STRIDES, CHANNELS, targets(("l3", 8, 7, (4, 5))), RegressorConfig(width=8))
    assert regressor(student_levels())["l3"].shape == (2, 7, 4, 5)


def test_resizing_before_the_last_convolution_equals_resizing_after_it():
    small, native = (targets(("l3", 8, 7, size)) for size in ((5, 7), (8, 12)))
    config = RegressorConfig(width=8, norm="group")
    regressor = FeatureRegressor(STRIDES, CHANNELS, small, config).eval()
    reference = FeatureRegressor(STRIDES, CHANNELS, native, config).eval()
    reference.load_state_dict(regressor.state_dict())
    after = nn.functional.interpolate(reference(student_levels())["l3"], size=(5, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(regressor(student_levels())["l3"], after, rtol=1e-4, atol=1e-5)


def test_every_student_level_is_trained_even_without_a_target_of_its_stride():
    levels = [level.requires_grad_() for level in student_levels()]
    regressor = FeatureRegressor(STRIDES, CHANNELS, targets(("l2", 4, 3, (16, 24))), RegressorConfig(width=8))
    regressor(levels)["l2"].square().mean().backward()
    assert all(level.grad is not None and level.grad.abs().sum() > 0 for level in levels)


def test_coarse_levels_reach_fine_ones_and_not_the_other_way_round():
    wanted = targets(("l2", 4, 3, (16, 24)), ("l5", 32, 3, (2, 3)))
    regressor = FeatureRegressor(STRIDES, CHANNELS, wanted, RegressorConfig(width=8)).eval()
    before = regressor(student_levels())
    coarse = student_levels()
    coarse[3] = coarse[3] + 1
    fine = student_levels()
    fine[0] = fine[0] + 1
    assert not torch.allclose(regressor(coarse)["l2"], before["l2"])
    assert torch.equal(regressor(fine)["l5"], before["l5"])


def test_it_is_upernets_decoder_with_a_head_per_level():
    """Forward pass of mmseg's UPerHead, restated: all but the top level have a lateral and an output convolution."""
    wanted = targets(("l2", 4, 3, (16, 24)), ("l3", 8, 4, (8, 12)), ("l4", 16, 5, (4, 6)), ("l5", 32, 6, (2, 3)))
    regressor, levels = FeatureRegressor(STRIDES, CHANNELS, wanted, RegressorConfig(width=8)), student_levels()
    ppm = regressor.laterals[-1]
    pooled = [branch(nn.AdaptiveAvgPool2d(scale)(levels[3])) for scale, branch in zip((1, 2, 3, 6), ppm.branches, strict=True)]
    laterals = [regressor.laterals[i](levels[i]) for i in range(3)]
    laterals.append(ppm.join(torch.cat([levels[3], *(bilinear(each, levels[3]) for each in pooled)], dim=1)))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + bilinear(laterals[i], laterals[i - 1])
    merged = [*(regressor.outputs[str(i)](laterals[i]) for i in range(3)), laterals[3]]
    for level, each, head in zip(wanted, merged, regressor.heads, strict=True):
        torch.testing.assert_close(regressor(levels)[level.name], head(each))
    kernels = sorted(module.kernel_size[0] for module in regressor.modules() if isinstance(module, nn.Conv2d))
    assert kernels == [1] * (3 + 4 + 4) + [3] * (3 + 1)  # laterals, pooled maps and heads; outputs and the pooling's own


def bilinear(level: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return nn.functional.interpolate(level, size=like.shape[-2:], mode="bilinear", align_corners=False)


def test_pyramid_pooling_is_mean_pooling_at_each_scale():
    """Identity convolutions leave only the pooling: with one scale of 1, the branch is the mean over the image."""
    ppm = PyramidPooling(3, 3, (1,), "batch").eval()
    branch, join = ppm.branches[0], ppm.join
    branch[0].weight.data = torch.eye(3).view(3, 3, 1, 1)
    join[0].weight.data.zero_()
    for channel in range(3):
        join[0].weight.data[channel, 3 + channel, 1, 1] = 1  # take the branch, not the level itself
    level = torch.rand(2, 3, 6, 8)
    mean = level.mean(dim=(2, 3), keepdim=True).expand(2, 3, 6, 8)
    torch.testing.assert_close(ppm(level), mean, rtol=1e-4, atol=1e-4)  # batch norm's epsilon, twice


def test_default_pool_scales_and_width_are_the_papers():
    regressor = FeatureRegressor(STRIDES, CHANNELS, targets(("l5", 32, 3, (2, 3))), RegressorConfig())
    assert regressor.laterals[-1].scales == (1, 2, 3, 6)
    assert regressor.laterals[-1].join[0].out_channels == 256
    assert any(isinstance(module, nn.BatchNorm2d) for module in regressor.modules())


def test_a_target_without_a_student_stride_is_refused():
    with pytest.raises(ShapeError, match="l1 has stride 2"):
        FeatureRegressor(STRIDES, CHANNELS, targets(("l1", 2, 3, (32, 48))), RegressorConfig())
