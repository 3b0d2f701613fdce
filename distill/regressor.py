"""The feature regressor: FPN with pyramid pooling on the last level, and a 1x1 convolution to each teacher level.

As UPerNet's decoder (arXiv 1807.10221; mmseg's UPerHead), whose last level is the pyramid pooling's own 3x3 convolution.

The one place where a level changes its spatial size to the teacher's is `FeatureRegressor.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.manifests.errors import ShapeError

GROUPS = 32  # of group norm; fewer where the width does not divide, or gives groups too small for a pooled map of one cell
MIN_GROUP = 4


@dataclass(frozen=True)
class TargetLevel:
    """One teacher level to regress: `size` is its height and width."""

    name: str
    stride: int
    channels: int
    size: tuple[int, int]


def conv_norm_relu(channels_in: int, channels_out: int, kernel: int, norm: str) -> nn.Sequential:
    """Convolution that keeps the size, norm, ReLU. Shapes: (B, channels_in, H, W) -> (B, channels_out, H, W)."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, _norm(norm, channels_out), nn.ReLU(inplace=True))


def _norm(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    fitting = [count for count in range(1, GROUPS + 1) if channels % count == 0 and channels // count >= MIN_GROUP]
    groups = max(fitting, default=1)
    return nn.GroupNorm(groups, channels)


def _resize(level: Tensor, size: Sequence[int]) -> Tensor:
    if list(level.shape[-2:]) == list(size):
        return level
    return F.interpolate(level, size=tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """Context of the whole image at several scales, joined with the level it came from.

    Source: Zhao et al., arXiv 1612.01105, section 3.2; as the last lateral of UPerNet (arXiv 1807.10221).
    """

    def __init__(self, channels_in: int, width: int, scales: Sequence[int], norm: str) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.branches = nn.ModuleList(conv_norm_relu(channels_in, width, 1, norm) for _ in self.scales)
        self.join = conv_norm_relu(channels_in + len(self.scales) * width, width, 3, norm)

    def forward(self, level: Tensor) -> Tensor:
        """Shapes: (B, channels_in, H, W) -> (B, width, H, W)."""
        parts = [level]
        for scale, branch in zip(self.scales, self.branches, strict=True):
            parts.append(_resize(branch(F.adaptive_avg_pool2d(level, scale)), level.shape[-2:]))
        joined: Tensor = self.join(torch.cat(parts, dim=1))
        return joined


class FeatureRegressor(nn.Module):
    """Student levels to teacher levels (appendix D.1): laterals, top-down path, output convolutions, 1x1 heads.

    With pyramid pooling the last level has no output convolution of its own: the pooling ends in one.

    Every student level from the finest target's stride on takes part, so the whole backbone is trained even where the
    teacher has no level of the coarsest strides.
    """

    def __init__(self, strides: Sequence[int], channels: Sequence[int], targets: Sequence[TargetLevel], config: RegressorConfig) -> None:
        """`strides` and `channels` of the student's levels, finest first.

        Raises: ShapeError when a target's stride is not among the student's.
        """
        super().__init__()
        self.targets = tuple(targets)
        self.level_of = [_index_of(target, strides) for target in targets]
        self.laterals = nn.ModuleList(conv_norm_relu(c, config.width, 1, config.norm) for c in channels[:-1])
        last = PyramidPooling(channels[-1], config.width, config.ppm_scales, config.norm) if config.ppm else None
        self.laterals.append(last or conv_norm_relu(channels[-1], config.width, 1, config.norm))
        self.outputs = nn.ModuleDict({str(i): self._output(i, len(channels) - 1, config) for i in sorted(set(self.level_of))})
        self.heads = nn.ModuleList(nn.Conv2d(config.width, target.channels, 1) for target in targets)

    @staticmethod
    def _output(idx: int, last: int, config: RegressorConfig) -> nn.Module:
        if config.ppm and idx == last:
            return nn.Identity()
        return conv_norm_relu(config.width, config.width, 3, config.norm)

    def forward(self, levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Student levels, finest first, to f_r by teacher level.

        Shapes: levels[i] (B, channels[i], H_i, W_i) -> {name: (B, target.channels, *target.size)}.
        """
        merged = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]  # (B, width, H_i, W_i)
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + _resize(merged[i + 1], merged[i].shape[-2:])
        smooth = {idx: output(merged[int(idx)]) for idx, output in self.outputs.items()}
        regressed = {}
        for target, idx, head in zip(self.targets, self.level_of, self.heads, strict=True):
            regressed[target.name] = head(_resize(smooth[str(idx)], target.size))  # a 1x1 commutes with the resize
        return regressed


def _index_of(target: TargetLevel, strides: Sequence[int]) -> int:
    if target.stride not in strides:
        raise ShapeError(f"level {target.name} has stride {target.stride}, the student's levels have {list(strides)}")
    return list(strides).index(target.stride)
