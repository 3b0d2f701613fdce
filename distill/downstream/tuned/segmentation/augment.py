"""The training view of an image with a mask: scaled, cropped, mirrored, and in other colours; the mask follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.tuned.base import Example
from dtpipe.distill.downstream.tuned.config import AugmentConfig, TuneConfig
from dtpipe.distill.downstream.tuned.segmentation.inference import Px, scaled_size
from dtpipe.distill.downstream.tuned.segmentation.network import MASK_TARGET
from dtpipe.distill.stream.batch import scaled_levels
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Mask, Pixels, Target

CROP_TRIES = 10
"""Crops that are drawn, as in mmsegmentation, until none of the classes has too large a share."""
FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
"""Of a crop beside the image, uint8."""


def mask_augment(classes: ClassTable, config: TuneConfig) -> Callable[[Pixels, Target], Example]:
    """Scale, crop, flip, colours, in that order.

    Source: mmsegmentation's Resize, RandomCrop, RandomFlip, PhotoMetricDistortion and Pad.
    Differs: masks are resized by the nearest pixel centre, as images are; there by the nearest corner.
    """
    augment, colours = config.augment, _photometric() if config.augment.photometric else None

    def view(pixels: Pixels, target: Target) -> Example:
        image = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
        mask = tv_tensors.Mask(mask_tensor(cast(Mask, target), classes)[None])
        image, mask = _crop(*_scale(image, mask, augment), augment)
        if torch.rand(()) < augment.flip:
            image, mask = v2.functional.horizontal_flip(image), v2.functional.horizontal_flip(mask)
        if colours is not None:
            image = colours(image)
        image, mask = _fill_up(image, mask, augment.crop_px)
        floats = scaled_levels(image.as_subclass(Tensor))
        return Example(floats, {MASK_TARGET: mask.as_subclass(Tensor)[0]})

    return view


def mask_tensor(mask: Mask, classes: ClassTable) -> Tensor:
    """Class of each pixel, `IGNORE` where none counts. Shapes: -> (H, W) int64.

    Raises: InputError for a class that is not in the table.
    """
    numbers = np.where(mask.known, mask.numbers.astype(np.int64), IGNORE)
    if numbers.size and int(numbers.max()) >= len(classes):
        raise InputError(
            f"a mask holds class {int(numbers.max())}, and there are {len(classes)} classes, from 0 on; give all "
            "classes, or its value as --ignore-value"
        )
    return torch.from_numpy(numbers)


def _photometric() -> Callable[[Any], Any]:
    """Brightness, contrast, saturation and hue, each half of the time, contrast before or after the colours.

    Source: mmsegmentation's PhotoMetricDistortion, which is SSD's without its change of channels.
    Differs: brightness is multiplied by 1 +- 1/8 there added in steps; contrast keeps the mean.
    """
    contrast = v2.RandomApply([v2.ColorJitter(contrast=0.5)])
    colours = [v2.RandomApply([v2.ColorJitter(saturation=0.5)]), v2.RandomApply([v2.ColorJitter(hue=0.1)])]
    order = v2.RandomChoice([v2.Compose([contrast, *colours]), v2.Compose([*colours, contrast])])
    jitter: Callable[[Any], Any] = v2.Compose([v2.RandomApply([v2.ColorJitter(brightness=0.125)]), order])
    return jitter


def drawn_size(size_px: Px, augment: AugmentConfig) -> Px:
    """Height and width at a drawn short side, within the limit of the long one, times a drawn scale; what leaves no
    choice draws nothing."""
    low, high = augment.scale
    scale = low + (high - low) * float(torch.rand(())) if high > low else low
    drawn = int(torch.randint(len(augment.short_px), ())) if len(augment.short_px) > 1 else 0
    short_px = augment.short_px[drawn] if augment.short_px else None
    return scaled_size(size_px, short_px, augment.long_px, scale)


def _scale(image: Any, mask: Any, augment: AugmentConfig) -> tuple[Any, Any]:
    """Another size, of the same aspect."""
    own = (image.shape[-2], image.shape[-1])
    size = drawn_size(own, augment)
    if size == own:
        return image, mask
    nearest = F.interpolate(mask[None].float(), size=size, mode="nearest-exact")[0].long()
    return v2.functional.resize(image, list(size), antialias=True), tv_tensors.Mask(nearest)


def _crop(image: Any, mask: Any, augment: AugmentConfig) -> tuple[Any, Any]:
    """A part of at most the crop's size, drawn again where one class has more of it than it may."""
    own = (image.shape[-2], image.shape[-1])
    size = [min(px, crop) for px, crop in zip(own, augment.crop_px or own, strict=True)]
    if tuple(size) == own:
        return image, mask
    for _ in range(CROP_TRIES):
        top, left = (int(torch.randint(px - part + 1, ())) for px, part in zip(own, size, strict=True))
        cropped = v2.functional.crop(mask, top, left, *size)
        if largest_share(cropped) < augment.max_class_share or augment.max_class_share == 1.0:
            break
    return v2.functional.crop(image, top, left, *size), cropped


def largest_share(mask: Tensor) -> float:
    """Share that the most frequent class has of the known pixels; 1 where none is known. Shapes: any, integers."""
    counts = torch.unique(mask.as_subclass(Tensor)[mask.as_subclass(Tensor) != IGNORE], return_counts=True)[1]
    return float(counts.max() / counts.sum()) if len(counts) else 1.0


def _fill_up(image: Any, mask: Any, crop_px: tuple[int, int] | None) -> tuple[Any, Any]:
    """To the crop's size, at the right and the bottom."""
    if crop_px is None or tuple(image.shape[-2:]) == tuple(crop_px):
        return image, mask
    padding = [0, 0, crop_px[1] - image.shape[-1], crop_px[0] - image.shape[-2]]
    return v2.functional.pad(image, padding, fill=list(FILL)), v2.functional.pad(mask, padding, fill=IGNORE)
