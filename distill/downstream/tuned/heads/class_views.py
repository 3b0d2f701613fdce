"""How images are seen by networks that classify whole images: timm's transforms, in training and in scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform  # type: ignore[attr-defined]  # its documented name
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision import transforms

from dtpipe.distill.downstream.tuned.config import AugmentConfig, TuneConfig
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Pixels

_JITTER = 0.4  # timm's
_TRIVIAL = "trivial"


class ClassView:
    """An image as it is scored: short side by bicubic interpolation, then the middle.

    `inference.short_px` is that side, by default the crop's, so that nothing but the ends of the long side is lost.
    """

    def __init__(self, config: TuneConfig) -> None:
        crop = config.augment.crop_px
        assert crop is not None
        share = min(crop) / (config.inference.short_px or min(crop))
        size = (3, *crop)
        self._transform = create_transform(
            size, crop_pct=share, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Shapes: (3, H, W) float32 in [-1, 1] -> (3, *crop_px), on the device of the image."""
        pixels = image.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        seen: Tensor = self._transform(Image.fromarray(pixels))
        return seen.to(image.device)


def class_augmentation(config: TuneConfig) -> Callable[[Pixels], Tensor]:
    """Training views: random crop, flip, policy, random erasing, in timm's order. Shapes: (H, W, 3) -> (3, *crop_px).

    With `scale` 1 the crop is as large as it can be, at a random place along the long side.

    Source: timm `data/transforms_factory.py`; with policy `trivial` its AutoAugment is replaced by TrivialAugmentWide,
    as in SparK's `downstream_imagenet/data.py`. Raises: ConfigError for a policy that timm does not read.
    """
    augment = config.augment
    assert augment.crop_px is not None
    first, second, last = _timm_parts(augment, augment.crop_px)
    if augment.scale == (1.0, 1.0):  # in its own aspect, as it is scored; along the long side anywhere
        crop: list[Any] = [
            ResizeKeepRatio(augment.crop_px, longest=0.0, interpolation="bicubic"),  # type: ignore[no-untyped-call]
            transforms.RandomCrop(augment.crop_px),
        ]
        first = transforms.Compose([*crop, transforms.RandomHorizontalFlip(augment.flip)])
    if augment.policy == _TRIVIAL:
        second = transforms.TrivialAugmentWide(interpolation=transforms.InterpolationMode.BICUBIC)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def view(image: Pixels) -> Tensor:
        seen: Tensor = last(second(first(Image.fromarray(np.ascontiguousarray(image)))))
        return (seen * std + mean) * 2 - 1  # random erasing fills in timm's normalised values

    return view


def _timm_parts(augment: AugmentConfig, crop_px: tuple[int, int]) -> tuple[Any, Any, Any]:
    """timm's training transform in three: crop and flip, policy, what is done to tensors."""
    policy = None if augment.policy == _TRIVIAL else augment.policy
    try:
        first, second, last = create_transform(
            (3, *crop_px),
            is_training=True,
            scale=augment.scale,
            hflip=augment.flip,
            color_jitter=_JITTER if augment.photometric else None,  # type: ignore[arg-type]
            auto_augment=policy,
            interpolation="bicubic",
            re_prob=augment.erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as err:  # timm checks a policy's words so
        raise ConfigError(
            f"eval.tune.augment.policy is {policy!r}, which timm does not read ({err!r}); give one such as "
            "rand-m9-mstd0.5-inc1, or trivial"
        ) from err
    return first, second, last
