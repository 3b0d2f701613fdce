"""Features of single pixels: each level brought to the image's size, bilinear, and joined.

They are made for the pixels that are asked for alone, since those of whole images take gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def features_at(levels: Mapping[str, Tensor], images: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Features of n pixels, as `F.interpolate` (bilinear, no aligned corners) of the whole would give them.

    Shapes: {level: (B, C, h, w)}, images (n,) and pixels (n,) int64, numbered along the rows of an image of `size`
    -> (n, sum of C), levels in the order of their names.
    """
    rows, columns = pixels // size[1], pixels % size[1]
    return torch.cat([_one_level(levels[name], images, rows, columns, size) for name in sorted(levels)], dim=1)


def _one_level(level: Tensor, images: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    (top, bottom, down), (left, right, across) = (
        _neighbours(places, level.shape[axis], size[axis - 2]) for places, axis in ((rows, 2), (columns, 3))
    )
    upper = torch.lerp(level[images, :, top, left], level[images, :, top, right], across)
    lower = torch.lerp(level[images, :, bottom, left], level[images, :, bottom, right], across)
    return torch.lerp(upper, lower, down)


def _neighbours(places: Tensor, num_cells: int, num_px: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells that a pixel lies between, and the share of the second. Shapes: (n,) -> (n,), (n,), (n, 1)."""
    at = ((places + 0.5) * (num_cells / num_px) - 0.5).clamp(min=0)
    first = at.long().clamp(max=num_cells - 1)
    return first, (first + 1).clamp(max=num_cells - 1), (at - first).float()[:, None]
