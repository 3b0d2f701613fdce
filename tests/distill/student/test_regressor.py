"""Shapes and parameter counts of the regressor's variants, and their parts against hand-written ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.regressor import FeatureRegressor, TargetLevel
from dtpipe.distill.student.regressors.fpn_attention import SelfAttention
from dtpipe.distill.student.regressors.fpn_ppm import PyramidPooling
from dtpipe.distill.student.regressors.pafpn import BottomUpPath
from dtpipe.distill.student.regressors.registry import REGRESSORS
from dtpipe.manifests.errors import ConfigError, ShapeError

STRIDES, CHANNELS = (4, 8, 16, 32), (6, 8, 10, 12)


def student_levels(height: int = 64, width: int = 96, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, height // s, width // s, generator=generator)
        for s, c in zip(STRIDES, CHANNELS, strict=True)
    ]


def targets(*levels: tuple[str, int, int, tuple[int, int]]) -> list[TargetLevel]:
    return [TargetLevel(*level) for level in levels]


FOUR = (("l2", 4, 20, (16, 24)), ("l3", 8, 24, (8, 12)), ("l5", 32, 28, (2, 3)), ("l3.b", 8, 5, (8, 12)))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("kind", REGRESSORS)
def test_each_target_gets_its_channels_and_size(norm, kind):
    regressor = FeatureRegressor(STRIDES, CHANNELS, targets(*FOUR), RegressorConfig(width=16, norm=norm, kind=kind))
    out = regressor(student_levels())
    assert {name: tuple(level.shape) for name, level in out.items()} == {
        "l2": (2, 20, 16, 24),
        "l3": (2, 24, 8, 12),
        "l5": (2, 28, 2, 3),
        "l3.b": (2, 5, 8, 12),
    }


def count_by_hand(kind: str, width: int) -> int:
    """Parameters for targets `FOUR`, from the papers' layouts: a convolution of k x k cells, two numbers of a norm."""

    def conv(channels_in: int, kernel: int) -> int:
        return channels_in * width * kernel**2 + 2 * width

    laterals = sum(conv(channels, 1) for channels in CHANNELS)
    heads = sum((width + 1) * channels for channels in (20, 24, 28, 5))
    outputs = 3 * conv(width, 3)  # levels of stride 4, 8 and 32 have targets
    if kind == "fpn_attention":
        return laterals + outputs + heads + 2 * width + (width + 1) * 3 * width + (width + 1) * width
    if kind == "pafpn":  # the way up to stride 32 leads through stride 16
        return laterals + 4 * conv(width, 3) + 2 * 3 * conv(width, 3) + heads
    if kind == "fpn_ppm":
        pooling = 4 * conv(12, 1) + conv(12 + 4 * width, 3)
        return laterals - conv(12, 1) + pooling + 2 * conv(width, 3) + heads
    return laterals + outputs + heads


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("kind", REGRESSORS)
def test_parameters_are_as_many_as_the_layout_has(kind, norm):
    for width in (16, 64):
        regressor = FeatureRegressor(
            STRIDES, CHANNELS, targets(*FOUR), RegressorConfig(width=width, norm=norm, kind=kind)
        )
        assert sum(p.numel() for p in regressor.parameters()) == count_by_hand(kind, width)


@pytest.mark.parametrize("wanted", [FOUR, FOUR[:1], FOUR[1:2], FOUR[2:3]])
@pytest.mark.parametrize("kind", REGRESSORS)
def test_every_parameter_is_trained_whatever_levels_are_wanted(kind, wanted):
    """Data-parallel training waits for each parameter's gradient."""
    finest = STRIDES.index(wanted[0][1])
    regressor = FeatureRegressor(
        STRIDES[finest:], CHANNELS[finest:], targets(*wanted), RegressorConfig(width=16, kind=kind)
    )
    sum(level.square().mean() for level in regressor(student_levels()[finest:]).values()).backward()
    assert [name for name, p in regressor.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", REGRESSORS)
def test_group_norm_leaves_no_batch_norm_and_batch_norm_can_be_synchronised(kind):
    group, batch = (RegressorConfig(width=16, norm=norm, kind=kind) for norm in ("group", "batch"))
    assert not any(
        isinstance(each, nn.BatchNorm2d)
        for each in FeatureRegressor(STRIDES, CHANNELS, targets(*FOUR), group).modules()
    )
    regressor = FeatureRegressor(STRIDES, CHANNELS, targets(*FOUR), batch)
    before = regressor(student_levels())
    num_norms = sum(isinstance(each, nn.BatchNorm2d) for each in regressor.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(regressor)
    assert sum(isinstance(each, nn.SyncBatchNorm) for each in converted.modules()) == num_norms > 0
    for name, level in converted(student_levels()).items():  # alone, it is batch norm
        torch.testing.assert_close(level, before[name])


def test_an_unknown_kind_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"kind is 'bifpn'; choose one of fpn, fpn_attention, pafpn, fpn_ppm"):
        FeatureRegressor(STRIDES, CHANNELS, targets(*FOUR), RegressorConfig(kind="bifpn"))


def test_levels_of_another_size_are_resized_to_the_teachers():
    regressor = FeatureRegressor(STRIDES, CHANNELS, targets(("l3", 8, 7, (4, 5))), RegressorConfig(width=8))
    assert regressor(student_levels())["l3"].shape == (2, 7, 4, 5)


def test_resizing_before_the_last_convolution_equals_resizing_after_it():
    small, native = (targets(("l3", 8, 7, size)) for size in ((5, 7), (8, 12)))
    config = RegressorConfig(width=8, norm="group")
    regressor = FeatureRegressor(STRIDES, CHANNELS, small, config).eval()
    reference = FeatureRegressor(STRIDES, CHANNELS, native, config).eval()
    reference.load_state_dict(regressor.state_dict())
    after = nn.functional.interpolate(
        reference(student_levels())["l3"], size=(5, 7), mode="bilinear", align_corners=False
    )
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
    pooled = [
        branch(nn.AdaptiveAvgPool2d(scale)(levels[3])) for scale, branch in zip((1, 2, 3, 6), ppm.branches, strict=True)
    ]
    laterals = [regressor.laterals[i](levels[i]) for i in range(3)]
    laterals.append(ppm.join(torch.cat([levels[3], *(bilinear(each, levels[3]) for each in pooled)], dim=1)))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + bilinear(laterals[i], laterals[i - 1])
    merged = [*(regressor.outputs[str(i)](laterals[i]) for i in range(3)), laterals[3]]
    for level, each, head in zip(wanted, merged, regressor.heads, strict=True):
        torch.testing.assert_close(regressor(levels)[level.name], head(each))
    kernels = sorted(module.kernel_size[0] for module in regressor.modules() if isinstance(module, nn.Conv2d))
    assert kernels == [1] * (3 + 4 + 4) + [3] * (
        3 + 1
    )  # laterals, pooled maps and heads; outputs and the pooling's own


def test_pafpn_is_panets_two_ways():
    """mmdet's PAFPN, restated with torch's functions: strided convolution of the finer level, sum, convolution."""
    wanted = targets(("l2", 4, 3, (16, 24)), ("l3", 8, 4, (8, 12)), ("l4", 16, 5, (4, 6)), ("l5", 32, 6, (2, 3)))
    regressor, levels = (
        FeatureRegressor(STRIDES, CHANNELS, wanted, RegressorConfig(width=8, kind="pafpn")),
        student_levels(),
    )

    def conv(block: nn.Sequential, level: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = block[0].weight
        flat = nn.functional.conv2d(level, weight, stride=stride, padding=weight.shape[-1] // 2)
        return nn.functional.batch_norm(flat, None, None, block[1].weight, block[1].bias, training=True).relu()

    down = [conv(lateral, level) for lateral, level in zip(regressor.laterals, levels, strict=True)]
    for i in (3, 2, 1):
        down[i - 1] = down[i - 1] + bilinear(down[i], down[i - 1])
    inner = [conv(regressor.outputs[str(i)], down[i]) for i in range(4)]
    outer = [inner[0]]
    for i in range(3):
        outer.append(conv(regressor.path.outputs[i], inner[i + 1] + conv(regressor.path.downs[i], outer[i], stride=2)))
    for level, each, head in zip(wanted, outer, regressor.heads, strict=True):
        torch.testing.assert_close(regressor(levels)[level.name], head(each), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reaches"), [("fpn", False), ("fpn_attention", False), ("fpn_ppm", False), ("pafpn", True)]
)
def test_fine_levels_reach_coarse_ones_by_the_bottom_up_path_only(kind, reaches):
    wanted = targets(("l2", 4, 3, (16, 24)), ("l5", 32, 3, (2, 3)))
    regressor = FeatureRegressor(STRIDES, CHANNELS, wanted, RegressorConfig(width=8, kind=kind)).eval()
    fine = student_levels()
    fine[0] = fine[0] + 1
    assert torch.equal(regressor(fine)["l5"], regressor(student_levels())["l5"]) is not reaches


def test_odd_sizes_pass_the_bottom_up_path():
    path = BottomUpPath(3, 8, "batch")
    sizes = [(15, 25), (8, 13), (3, 6)]  # rounded up, then down
    assert [tuple(level.shape[-2:]) for level in path([torch.rand(2, 8, *size) for size in sizes])] == sizes


@pytest.mark.parametrize(("channels", "heads"), [(64, 2), (24, 1)])
def test_attention_is_torchs_multi_head_attention_on_the_normed_level(channels, heads):
    block, theirs = SelfAttention(channels, "group"), nn.MultiheadAttention(channels, heads, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight.flatten(1),
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.proj.weight.flatten(1),
            "out_proj.bias": block.proj.bias,
        }
    )
    level = torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = block.norm(level).flatten(2).transpose(1, 2)
    expected = level + theirs(tokens, tokens, tokens)[0].transpose(1, 2).view_as(level)
    torch.testing.assert_close(block(level), expected, rtol=1e-4, atol=1e-5)


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
