"""Images in their two forms: uint8 [0, 255] as they are stored and shown, float32 [-1, 1] as networks see and make
them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def from_pixels(images: Tensor) -> Tensor:
    """What a network sees. Shapes: (B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Tensor:
    """What a network made, cut off at [-1, 1] and rounded; NaN is grey. Shapes: (B, 3, H, W) -> (B, H, W, 3) uint8."""
    import torch

    levels = images.float().nan_to_num().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1)
