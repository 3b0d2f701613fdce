"""FPN with self-attention on the coarsest level."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.blocks import build_norm
from dtpipe.distill.student.regressors.base import RegressorKind, lateral

HEAD_CHANNELS = 32  # one head where the width does not divide


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


def attending_lateral(channels: int, config: RegressorConfig) -> nn.Module:
    """Shapes: (B, channels, H, W) -> (B, width, H, W)."""
    return nn.Sequential(lateral(channels, config), SelfAttention(config.width, config.norm))


REGRESSOR = RegressorKind("fpn_attention", "FPN with a self-attention layer on the coarsest level", attending_lateral)
