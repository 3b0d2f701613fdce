"""What the regressor is built of: convolution with norm, pyramid pooling, self-attention, bottom-up path.

Every block takes its norm from the config, so that `norm: group` leaves no batch norm anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (
    32  # of group norm; fewer where the width does not divide, or gives groups too small for a pooled map of one cell
)
MIN_GROUP = 4
HEAD_CHANNELS = 32  # of self-attention; one head where the width does not divide


def conv_norm_relu(channels_in: int, channels_out: int, kernel: int, norm: str, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU. Shapes: (B, channels_in, H, W) -> (B, channels_out, ceil(H / stride), ceil(W / stride))."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, build_norm(norm, channels_out), nn.ReLU(inplace=True))


def build_norm(norm: str, channels: int) -> nn.Module:
    """Batch norm, or group norm with as many groups as fit."""
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
            parts.append(resize(branch(F.adaptive_avg_pool2d(level, scale)), level.shape[-2:]))
        joined: Tensor = self.join(torch.cat(parts, dim=1))
        return joined


class SelfAttention(nn.Module):
    """Every position of a level looks at all others; added to the level.

    Differs: the paper names an attention layer only. This is the residual block of diffusion U-Nets: norm, multi-head
    scaled dot-product attention over positions, projection; without position embeddings, as convolutions surround it.
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.num_heads = channels // HEAD_CHANNELS if channels % HEAD_CHANNELS == 0 else 1
        self.norm = build_norm(norm, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, level: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, C, H, W)."""
        b, c, h, w = level.shape
        heads = self.qkv(self.norm(level)).view(b, 3, self.num_heads, c // self.num_heads, h * w)
        query, key, value = heads.transpose(-1, -2).unbind(dim=1)  # (B, heads, H*W, C/heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        attended: Tensor = level + self.proj(mixed.transpose(-1, -2).reshape(b, c, h, w))
        return attended


class BottomUpPath(nn.Module):
    """Fine levels reach coarse ones: each level adds a strided convolution of the finer one, then is convolved itself.

    Source: Liu et al., PANet, arXiv 1803.01534, section 3.1 (N_i); the finest level stays as it is.
    """

    def __init__(self, num_levels: int, width: int, norm: str) -> None:
        super().__init__()
        self.downs = nn.ModuleList(conv_norm_relu(width, width, 3, norm, stride=2) for _ in range(num_levels - 1))
        self.outputs = nn.ModuleList(conv_norm_relu(width, width, 3, norm) for _ in range(num_levels - 1))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Shapes: [(B, width, H_i, W_i)], finest first -> the same."""
        path = [levels[0]]
        for level, down, output in zip(levels[1:], self.downs, self.outputs, strict=True):
            path.append(output(level + resize(down(path[-1]), level.shape[-2:])))
        return path
