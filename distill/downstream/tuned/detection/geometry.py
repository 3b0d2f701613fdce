"""An image and all that is tied to its pixels, varied alike by torchvision's transforms.

Random numbers are torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dtpipe.distill.downstream.tuned.config import AugmentConfig
from dtpipe.distill.downstream.tuned.segmentation.augment import drawn_size
from dtpipe.distill.stream.batch import scaled_levels
from dtpipe.manifests.labels import Pixels


def vary_whole(
    pixels: Pixels, tied: Mapping[str, Tensor], config: AugmentConfig
) -> tuple[tv_tensors.Image, dict[str, Tensor]]:
    """Colours, mirroring, size and crop of an image, with the boxes and masks that are tied to it.

    The size follows `short_px` and `long_px`, times `scale`; a crop is never larger than the image, and there is none
    without `crop_px`. Shapes: (H, W, 3) uint8 -> (3, H', W') uint8; `tied` holds torchvision's `tv_tensors`.
    """
    image: Any = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
    colours: list[v2.Transform] = [v2.RandomPhotometricDistort()] if config.photometric else []
    image, tied = v2.Compose([*colours, v2.RandomHorizontalFlip(config.flip)])(image, dict(tied))
    size = list(drawn_size((pixels.shape[0], pixels.shape[1]), config))
    image, tied = v2.functional.resize(image, size, antialias=True), {k: _resized(v, size) for k, v in tied.items()}
    if config.crop_px is not None:
        height, width = (min(*sides) for sides in zip(config.crop_px, image.shape[-2:], strict=True))
        image, tied = v2.RandomCrop((height, width))(image, tied)
    return image, dict(tied)


def _resized(value: Tensor, size: list[int]) -> Tensor:
    """Boxes and masks at another size, masks by the nearest pixel centre; whatever else there is, as it is."""
    if isinstance(value, tv_tensors.BoundingBoxes):
        boxes: Tensor = v2.functional.resize(value, size)
        return boxes
    if not isinstance(value, tv_tensors.Mask) or list(value.shape[-2:]) == size:
        return value
    plain = value.as_subclass(Tensor)
    exact = plain if plain.dtype == torch.uint8 else plain.double()
    nearest: Tensor = tv_tensors.Mask(F.interpolate(exact[:, None], size, mode="nearest-exact")[:, 0].to(plain.dtype))
    return nearest


def to_student(image: Tensor) -> Tensor:
    """As students take it. Shapes: (3, H, W) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return scaled_levels(image.as_subclass(Tensor))
