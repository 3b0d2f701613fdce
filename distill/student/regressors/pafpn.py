"""FPN followed by a path that brings fine levels back to coarse ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.blocks import conv_norm_relu, resize
from dtpipe.distill.student.regressors.base import RegressorKind, lateral


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


def bottom_up(num_levels: int, config: RegressorConfig) -> nn.Module:
    """The path over that many levels."""
    return BottomUpPath(num_levels, config.width, config.norm)


REGRESSOR = RegressorKind("pafpn", "FPN followed by PANet's bottom-up path", lateral, path=bottom_up)
