"""How whole images are looked at: at which sizes, mirrored or not, whole or through windows.

Probabilities are averaged over sizes and mirrored images, logits over windows that overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.tuned.config import InferenceConfig
from dtpipe.distill.student.blocks import resize
from dtpipe.manifests.errors import ConfigError

ROOM_PX = 32
"""Smaller images are filled up to this height and width: a coarsest level has stride 32."""

Logits = Callable[[Tensor], Tensor]
"""(B, 3, H, W) -> (B, K, h, w)."""
Px = tuple[int, int]


@dataclass(frozen=True)
class Views:
    """What an image is looked at through."""

    short_px: int | None = None
    long_px: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flips: bool = False
    window_px: Px | None = None
    """None: whole images."""
    stride_px: Px | None = None
    """Step of the window; None: two thirds of it."""

    @classmethod
    def of(cls, config: InferenceConfig, own_px: Px | None = None) -> Views:
        """own_px: the one size that a student takes, which is then the window's; None: it takes any.

        Raises: ConfigError for windows that such a student cannot take, or steps that leave pixels out.
        """
        window, step = config.window_px or own_px, config.stride_px
        if own_px is not None and window != own_px:
            raise ConfigError(
                f"the student takes images of {own_px[0]}x{own_px[1]} px alone; leave eval.tune.inference.window_px "
                "out, which makes that the window"
            )
        if step is not None and window is None:
            raise ConfigError("eval.tune.inference.stride_px is the step of a window; give window_px too")
        if step is not None and window is not None and any(own > px for own, px in zip(step, window, strict=True)):
            raise ConfigError(
                f"eval.tune.inference.stride_px {list(step)} steps over pixels beside windows of {list(window)} px; "
                "make it smaller"
            )
        return cls(config.short_px, config.long_px, config.scales, config.flips, window, step)

    def looks(self, size_px: Px) -> list[tuple[Px, bool]]:
        """The size at which an image of `size_px` is seen, and whether it is mirrored, for each look at it."""
        mirrored = (False, True) if self.flips else (False,)
        return [
            (scaled_size(size_px, self.short_px, self.long_px, scale), flip)
            for scale, flip in product(self.scales, mirrored)
        ]


def class_probabilities(logits: Logits, images: Tensor, views: Views) -> Iterator[Tensor]:
    """Probability of each class in each pixel of images of one size, one image after another.

    Logits are brought to the image's own size before softmax, as in mmsegmentation 0.x.

    Shapes: images (B, 3, H, W) in [-1, 1] -> B times (K, H, W) float32.
    """
    height, width = images.shape[-2:]
    seen = []
    for view, flip in looks_at(images, views):
        found = seen_through(logits, view, views)
        seen.append(found.flip(-1) if flip else found)
    for parts in zip(*seen, strict=True):
        probabilities = resize(parts[0][None], (height, width))[0].softmax(dim=0)
        for part in parts[1:]:
            probabilities += resize(part[None], (height, width))[0].softmax(dim=0)
        yield probabilities.div_(len(parts))


def looks_at(images: Tensor, views: Views) -> Iterator[tuple[Tensor, bool]]:
    """Images of one size as each look sees them, and whether they are mirrored there.

    Shapes: (B, 3, H, W) -> (B, 3, h, w), by look.
    """
    own = (images.shape[-2], images.shape[-1])
    for size, flip in views.looks(own):
        view = F.interpolate(images, size, mode="bilinear", antialias=True) if size != own else images
        yield view.flip(-1) if flip else view, flip


def scaled_size(size_px: Px, short_px: int | None, long_px: int | None, scale: float) -> Px:
    """Height and width of an image whose short side comes to `short_px` and whose long side stays within `long_px`,
    both times `scale`. Source: mmcv's rescale_size, which rounds halves up."""
    factor = short_px / min(size_px) if short_px is not None else 1.0
    if long_px is not None:
        factor = min(factor, long_px / max(size_px))
    height, width = (max(1, math.floor(px * factor * scale + 0.5)) for px in size_px)
    return height, width


def seen_through(logits: Logits, images: Tensor, views: Views) -> Tensor:
    """Logits of images, whole or through windows, of the size that the network gives them or of the images'.

    Shapes: (B, 3, H, W) -> (B, K, h, w), with windows (B, K, H, W).
    """
    if views.window_px is None:
        return _with_room(logits, images, (ROOM_PX, ROOM_PX))
    return window_rows(logits, images, views, 0, images.shape[-2])


def window_rows(logits: Logits, images: Tensor, views: Views, first: int, end: int) -> Tensor:
    """Logits of some rows of images through all windows that touch them, averaged where they overlap.

    Shapes: (B, 3, H, W) -> (B, K, end - first, W).
    """
    assert views.window_px is not None
    window = views.window_px
    step = views.stride_px or (max(1, round(2 * window[0] / 3)), max(1, round(2 * window[1] / 3)))
    height, width = images.shape[-2:]
    tops = [top for top in starts(height, window[0], step[0]) if top < end and top + window[0] > first]
    sums: Tensor | None = None
    counts = images.new_zeros(end - first, width)
    for top, left in product(tops, starts(width, window[1], step[1])):
        crop = images[..., top : top + window[0], left : left + window[1]]
        found = resize(_with_room(logits, crop, window), crop.shape[-2:])  # (B, K, h, w)
        if sums is None:
            sums = found.new_zeros(*found.shape[:2], end - first, width)
        upper, lower = max(top, first), min(top + crop.shape[-2], end)
        rows, columns = slice(upper - first, lower - first), slice(left, left + window[1])
        sums[..., rows, columns] += found[..., upper - top : lower - top, :]
        counts[rows, columns] += 1
    assert sums is not None
    return sums / counts


def starts(image_px: int, window_px: int, step_px: int) -> list[int]:
    """Where windows begin along one side: every step, the last moved back to end with the image.

    Source: mmsegmentation's slide_inference.
    """
    num = max(image_px - window_px + step_px - 1, 0) // step_px + 1
    return [max(min(idx * step_px, image_px - window_px), 0) for idx in range(num)]


def _with_room(logits: Logits, images: Tensor, least: Px) -> Tensor:
    """Logits of images that are filled up to a least size, without what was filled; else of any size."""
    height, width = images.shape[-2:]
    if height >= least[0] and width >= least[1]:
        return logits(images)
    full = (max(height, least[0]), max(width, least[1]))
    padded = F.pad(images, (0, full[1] - width, 0, full[0] - height))
    return resize(logits(padded), full)[..., :height, :width]
