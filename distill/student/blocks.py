"""What every part of the regressor is built of: convolution with norm, and the resize of a level.

Every block takes its norm from the config, so that `norm: group` leaves no batch norm anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (
    32  # of group norm; fewer where the width does not divide, or gives groups too small for a pooled map of one cell
)
MIN_GROUP = 4


def conv_norm_relu(channels_in: int, channels_out: int, kernel: int, norm: str, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU.

    Shapes: (B, channels_in, H, W) -> (B, channels_out, ceil(H / stride), ceil(W / stride)).
    """
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, build_norm(norm, channels_out), nn.ReLU(inplace=True))


def build_norm(norm: str, channels: int) -> nn.Module:
    """Batch norm, group norm with as many groups as fit, or nothing for `none`."""
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    fitting = [count for count in range(1, GROUPS + 1) if channels % count == 0 and channels // count >= MIN_GROUP]
    groups = max(fitting, default=1)
    return nn.GroupNorm(groups, channels)


def resize(level: Tensor, size: Sequence[int]) -> Tensor:
    """A level at another size, bilinear. Shapes: (B, C, H, W) -> (B, C, *size)."""
    if list(level.shape[-2:]) == list(size):
        return level
    return F.interpolate(level, size=tuple(size), mode="bilinear", align_corners=False)
