"""FPN with pyramid pooling on the coarsest level, which is UPerNet's decoder (arXiv 1807.10221; mmseg's UPerHead)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.blocks import conv_norm_relu, resize
from dtpipe.distill.student.regressors.base import RegressorKind


class PyramidPooling(nn.Module):
    """Context of the whole image at several scales, joined with the level it came from.

    Source: Zhao et al., arXiv 1612.01105, section 3.2; as the last lateral of UPerNet.
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


def pooling_lateral(channels: int, config: RegressorConfig) -> nn.Module:
    """Shapes: (B, channels, H, W) -> (B, width, H, W)."""
    return PyramidPooling(channels, config.width, config.ppm_scales, config.norm)


REGRESSOR = RegressorKind(
    "fpn_ppm",
    "FPN with pyramid pooling on the coarsest level: the paper's choice",
    pooling_lateral,
    smooth_coarsest=False,
)
