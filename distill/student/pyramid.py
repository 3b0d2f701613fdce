"""The simple feature pyramid: several strides from the single map of a plain vision transformer.

It stands between student and regressor and is thrown away with the latter: an exported backbone is the transformer
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.distill.student.blocks import build_norm

PYRAMID_STRIDES = (4, 8, 16, 32)
"""What a pyramid gives, as the stages of a convolutional backbone do."""


class SimplePyramid(nn.Module):
    """Finer levels by transposed convolutions that double the size and halve the channels, coarser ones by max pooling.

    Source: Li et al., ViTDet, arXiv 2203.16527, section 3 (simple feature pyramid).
    Differs: the norm between two transposed convolutions is the regressor's, not layer norm; the 1x1 and 3x3
    convolutions that follow there are the regressor's laterals and output convolutions here.
    """

    def __init__(self, stride: int, channels: int, strides: Sequence[int], norm: str) -> None:
        """`stride` of the map there is, `strides` of the levels to make, finest first; powers of two."""
        super().__init__()
        self.doublings = [stride.bit_length() - target.bit_length() for target in strides]
        self.levels = nn.ModuleList(_upscale(channels, max(0, count), norm) for count in self.doublings)
        self.channels = tuple(channels >> max(0, count) for count in self.doublings)

    def forward(self, level: Tensor) -> list[Tensor]:
        """Shapes: (B, C, H, W) -> [(B, channels[i], H * 2^doublings[i], W * 2^doublings[i])], halves rounded up."""
        return [_halve(upscale(level), -count) for upscale, count in zip(self.levels, self.doublings, strict=True)]


def _upscale(channels: int, doublings: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for idx in range(doublings):
        if idx > 0:
            layers += [build_norm(norm, channels >> idx), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels >> idx, channels >> (idx + 1), 2, stride=2))
    return nn.Sequential(*layers)


def _halve(level: Tensor, times: int) -> Tensor:
    for _ in range(times):
        level = F.max_pool2d(level, 2, ceil_mode=True)
    return level
