"""W of equation (1), the teacher's level as the student regresses it, and what a dataset says of its channels.

Whitening is of each sample alone, or of the dataset: each channel by its own mean and variance. One rule: statistics
are float64 and merge, so that how the samples were cut changes their last bits alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtpipe.distill.engine.device import as_float64

Whitening = Literal["layer", "channel", "dataset", "none"]
WHITEN_EPS = 1e-5  # of torch's LayerNorm
_DIMS = {"layer": (1, 2, 3), "channel": (1,)}


def whiten(level: Tensor, over: Whitening = "layer") -> Tensor:
    """LayerNorm without affine parameters: what each sample says of itself.

    Over (C, H, W) of each sample ("layer"), over C at each position ("channel"); otherwise the level stays as it is.

    Shapes: (B, C, H, W) -> (B, C, H, W), float32.
    """
    level = level.float()
    if over not in _DIMS:
        return level
    variance, mean = torch.var_mean(level, dim=_DIMS[over], correction=0, keepdim=True)
    return (level - mean) * torch.rsqrt(variance + WHITEN_EPS)


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and variance of each channel of a level, over samples, views and positions. (C,) float64, on the CPU."""

    num: int
    """Values of a channel."""
    mean: Tensor
    squares: Tensor
    """Sum of the squared deviations from the mean."""

    @classmethod
    def of(cls, level: Tensor) -> ChannelStatistics:
        """Of some samples. Shapes: (B, C, H, W)."""
        values = as_float64(level).movedim(1, 0).flatten(1)  # (C, B*H*W)
        mean = values.mean(dim=1)
        squares = (values - mean[:, None]).square().sum(dim=1)
        return cls(values.shape[1], mean.cpu(), squares.cpu())

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Of the samples of both. Source: Chan, Golub, LeVeque, 1979, equation (2.1)."""
        num, apart = self.num + other.num, other.mean - self.mean
        mean = self.mean + apart * (other.num / num)
        squares = self.squares + other.squares + apart.square() * (self.num * other.num / num)
        return ChannelStatistics(num, mean, squares)

    @property
    def variance(self) -> Tensor:
        """Not corrected for the number of samples, as norms have it."""
        return self.squares / self.num


class Whitener:
    """W of a run, level by level, and how far W(f_g) is from what a constant would say of it."""

    def __init__(
        self,
        over: Whitening = "layer",
        statistics: Mapping[str, ChannelStatistics] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`statistics`: by level, of `whiten(f_g, over)`; `dataset` needs them, and R². `device`: where levels are."""
        self.over = over
        known = (statistics or {}).items()
        self._means = {name: _cells(of_level.mean, device) for name, of_level in known}
        self._scales = {name: _cells(torch.rsqrt(of.variance + WHITEN_EPS), device) for name, of in known}

    def __call__(self, name: str, level: Tensor) -> Tensor:
        """W(f_g) of the level of a name. Shapes: (B, C, H, W) -> (B, C, H, W), float32."""
        level = whiten(level, self.over)
        if self.over != "dataset":
            return level
        return (level - self._means[name]) * self._scales[name]

    def spread(self, name: str, white: Tensor) -> Tensor | None:
        """Mean squared deviation of W(f_g) from the dataset's mean of each channel: the error of that constant.

        None where nothing is known of the dataset. Shapes: white (B, C, H, W) -> scalar float32, mean over B.
        """
        if name not in self._means:
            return None
        if self.over == "dataset":  # whose means are 0
            return white.square().mean()
        return (white - self._means[name]).square().mean()


def _cells(of_channel: Tensor, device: torch.device | None) -> Tensor:
    """Shapes: (C,) -> (C, 1, 1), float32."""
    return of_channel.float()[:, None, None].to(device)
