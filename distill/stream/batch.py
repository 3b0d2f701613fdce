"""What a training step sees: one batch type for cached and live samples, and the student's image made from it.

Everything here is on the training device; flips of the image and casts of the levels happen here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureBatch:
    """Images and the teacher's features of one micro-batch. Losses cannot tell stored levels from live ones."""

    images: Tensor
    """(B, H, W, 3) uint8; flipped where the levels are those of the flipped image."""
    levels: dict[str, Tensor]
    """Level name to features (B, C, h, w), in the level's dtype, or a wider one where the live teacher gives that."""
    timesteps: dict[str, Tensor]
    """Level name to the timestep that the teacher saw of each sample, (B,) int64; 0 where it sees no noise."""
    keys: tuple[str, ...]
    labels: tuple[str | None, ...]
    epoch: int
    batch_idx: int
    """Which global batch of the epoch this is part of."""
    num_global: int
    """Samples in that global batch over all ranks."""
    weight: float
    """Share of the global batch that this part is; 0 where a rank has no sample left and repeats one."""
    smallest: int
    """Samples in the smallest part of the global batch on any rank."""
    last: bool
    """True for the last part of the global batch on this rank: the optimiser steps after it."""


def flip_where(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images that `flip` names, left to right.

    Shapes: images (B, H, W, 3) uint8, flip (B,) bool -> (B, H, W, 3) uint8.
    """
    return torch.where(flip[:, None, None, None], images.flip(2), images)


def mirror_where(level: Tensor, mirror: Tensor) -> Tensor:
    """Mirror the samples of a level that `mirror` names, left to right.

    Differs: features of a flipped image are not these (module `pipeline.flip_error` measures by how much); used on
    request only.

    Shapes: level (B, C, h, w), mirror (B,) bool -> (B, C, h, w).
    """
    return torch.where(mirror[:, None, None, None], level.flip(-1), level)


def scaled(images: Tensor) -> Tensor:
    """Stored images as a network takes them. Shapes: (B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return scaled_levels(images.permute(0, 3, 1, 2))


def scaled_levels(pixels: Tensor) -> Tensor:
    """Grey levels in [-1, 1]. Shapes: any, uint8 -> the same, float32."""
    return pixels.float().div(127.5).sub(1)


def student_images(images: Tensor, size_px: tuple[int, int]) -> Tensor:
    """The input of a student or teacher: scaled to [-1, 1] and, where sizes differ, resized with antialiasing on the
    device.

    Shapes: images (B, H, W, 3) uint8 -> (B, 3, *size_px) float32 in [-1, 1].
    """
    floats = scaled(images)  # (B, 3, H, W)
    if tuple(floats.shape[-2:]) == tuple(size_px):
        return floats
    return F.interpolate(floats, size=size_px, mode="bilinear", antialias=True).clamp(-1, 1)
