"""Heads that know the timestep: teacher levels of several timesteps differ, and one head would learn their mean.

Beyond the paper, whose targets are of one timestep. One rule: a head that has learned nothing yet changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMED = "timed"
"""What they are called in a regressor."""
_SIZE, _HIDDEN = 64, 128
_LONGEST = 10_000.0


def sinusoids(timesteps: Tensor, size: int = _SIZE) -> Tensor:
    """Cosines, then sines, of a timestep at frequencies from 1 down to nearly 1/10000.

    Shapes: (B,) -> (B, size) float32. Source: Vaswani et al., arXiv 1706.03762, section 3.5, in the order of ADM.
    """
    half = size // 2
    frequencies = torch.exp(-math.log(_LONGEST) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ScaleShift(nn.Module):
    """Scales and shifts the channels of a level by its timestep; with initial weights, by nothing.

    Source: the idea of CleanDIFT (Stracke et al., arXiv 2412.03439), whose projection heads are given the timestep.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(_SIZE, _HIDDEN)
        self.output = nn.Linear(_HIDDEN, 2 * channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, level: Tensor, timesteps: Tensor) -> Tensor:
        """Shapes: level (B, C, H, W), timesteps (B,) -> (B, C, H, W)."""
        scale, shift = self.output(F.silu(self.hidden(sinusoids(timesteps)))).chunk(2, dim=1)  # (B, C) each
        changed: Tensor = level * (1 + scale[..., None, None]) + shift[..., None, None]
        return changed


def has_timed_heads(names: Iterable[str]) -> bool:
    """Whether a regressor's weights, by name, are of heads that know the timestep."""
    return any(name.startswith(f"{TIMED}.") for name in names)
