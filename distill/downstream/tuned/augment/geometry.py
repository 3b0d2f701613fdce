"""An image and all that is tied to its pixels, varied alike by torchvision's transforms.

Random numbers are torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dtpipe.distill.downstream.tuned.config import AugmentConfig
from dtpipe.manifests.labels import Pixels


def vary_whole(
    pixels: Pixels, tied: Mapping[str, Tensor], config: AugmentConfig
) -> tuple[tv_tensors.Image, dict[str, Tensor]]:
    """Colours, mirroring, size and crop of an image, with the boxes and masks that are tied to it.

    The size follows `scale`, then `short_px` and `long_px`; a crop is never larger than the image, and there is none
    without `crop_px`. Shapes: (H, W, 3) uint8 -> (3, H', W') uint8; `tied` holds torchvision's `tv_tensors`.
    """
    image: Any = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
    steps: list[v2.Transform] = [v2.RandomPhotometricDistort()] if config.photometric else []
    steps += [v2.RandomHorizontalFlip(config.flip), v2.Resize(_draw_size(pixels.shape, config), antialias=True)]
    image, tied = v2.Compose(steps)(image, dict(tied))
    if config.crop_px is not None:
        height, width = (min(*sides) for sides in zip(config.crop_px, image.shape[-2:], strict=True))
        image, tied = v2.RandomCrop((height, width))(image, tied)
    return image, dict(tied)


def to_student(image: Tensor) -> Tensor:
    """As students take it. Shapes: (3, H, W) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return image.as_subclass(Tensor).float().div(127.5).sub(1)


def _draw_size(shape: tuple[int, ...], config: AugmentConfig) -> list[int]:
    """Height and width after a random scale and a drawn short side, within the limit of the long one."""
    low, high = config.scale
    scale = low + (high - low) * float(torch.rand(()))
    if config.short_px:
        short = config.short_px[int(torch.randint(len(config.short_px), ()))]
        scale *= short / min(shape[:2])
    if config.long_px is not None:
        scale = min(scale, config.long_px / max(shape[:2]))
    return [max(1, round(side * scale)) for side in shape[:2]]
