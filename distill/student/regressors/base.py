"""What a variant of the regressor declares: what it adds to an FPN's laterals, top-down path, output convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.blocks import conv_norm_relu


@dataclass(frozen=True)
class RegressorKind:
    """One variant, a row of the paper's table 8."""

    name: str
    summary: str
    coarsest: Callable[[int, RegressorConfig], nn.Module]
    """Makes the lateral of the coarsest level: (B, channels, H, W) -> (B, width, H, W)."""
    smooth_coarsest: bool = True
    """Whether the coarsest level has an output convolution; not where its lateral ends in one."""
    path: Callable[[int, RegressorConfig], nn.Module] | None = None
    """Makes what follows the output convolutions, for that many levels.

    Shapes: [(B, width, H_i, W_i)], finest first -> the same.
    """


def lateral(channels: int, config: RegressorConfig) -> nn.Module:
    """A level at the regressor's width. Shapes: (B, channels, H, W) -> (B, width, H, W)."""
    return conv_norm_relu(channels, config.width, 1, config.norm)
