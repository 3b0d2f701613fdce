"""Windows lie and overlap as mmsegmentation's do, and views of an image are averaged, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.tuned.config import InferenceConfig
from dtpipe.distill.downstream.tuned.segmentation.inference import (
    Views,
    class_probabilities,
    scaled_size,
    seen_through,
    starts,
)
from dtpipe.manifests.errors import ConfigError


def pixels(height: int, width: int, num: int = 2) -> Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def local(images: Tensor) -> Tensor:
    """Logits that depend on where a pixel lies in its window: of the window's size, three classes."""
    rows = torch.arange(images.shape[-2], dtype=images.dtype)[:, None]
    columns = torch.arange(images.shape[-1], dtype=images.dtype)
    return torch.stack([images[:, 0] + 0.1 * rows, images[:, 1] * columns, images[:, 2] + images.mean()], dim=1)


@pytest.mark.parametrize(("height", "width"), [(50, 70), (32, 48), (33, 49), (64, 32)])
@pytest.mark.parametrize("step", [(21, 32), (32, 48), (8, 7)])
def test_windows_are_averaged_as_by_a_loop_over_pixels(height, width, step) -> None:
    """The loop adds logits pixel by pixel, as the published rule places windows."""
    image, window = pixels(height, width, 1), (32, 32)
    views = Views(window_px=window, stride_px=(min(step[0], 32), min(step[1], 32)))
    step = views.stride_px
    sums, counts = torch.zeros(3, height, width, dtype=torch.float64), torch.zeros(height, width)
    for down in range(max(height - 32 + step[0] - 1, 0) // step[0] + 1):
        for right in range(max(width - 32 + step[1] - 1, 0) // step[1] + 1):
            bottom, end = min(down * step[0] + 32, height), min(right * step[1] + 32, width)
            top, left = max(bottom - 32, 0), max(end - 32, 0)
            logits = local(image[..., top:bottom, left:end])[0]
            for y in range(top, bottom):
                sums[:, y, left:end] += logits[:, y - top]
                counts[y, left:end] += 1
    assert counts.min() >= 1
    torch.testing.assert_close(seen_through(local, image, views)[0], sums / counts, rtol=1e-12, atol=1e-12)


def test_windows_begin_where_the_published_rule_says() -> None:
    assert starts(1024, 512, 341) == [0, 341, 512]  # ConvNeXt's single-scale test of ADE20K: the last ends the image
    assert starts(512, 512, 341) == starts(300, 512, 341) == [0]
    assert starts(513, 512, 341) == [0, 1]


def test_images_smaller_than_a_window_are_filled_up_for_the_network_alone() -> None:
    seen = []

    def logits(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return images

    image = pixels(20, 70, 1)
    found = seen_through(logits, image, Views(window_px=(32, 32)))
    assert set(seen) == {(32, 32)}
    torch.testing.assert_close(found, image, rtol=0, atol=0)
    assert seen_through(logits, pixels(20, 9, 1), Views()).shape == (1, 3, 20, 9)
    assert seen[-1] == (32, 32)


def test_flips_and_scales_average_probabilities_at_the_images_own_size() -> None:
    images = pixels(40, 56)

    def coarse(view: Tensor) -> Tensor:
        return F.avg_pool2d(local(view), 4)

    expected = torch.zeros(2, 3, 40, 56, dtype=torch.float64)
    for size in ((48, 67), (96, 134)):  # 1.2 and 2.4 times, halves rounded up
        for flip in (False, True):
            view = F.interpolate(images, size, mode="bilinear", antialias=True)
            logits = coarse(view.flip(-1)).flip(-1) if flip else coarse(view)
            resized = F.interpolate(logits, (40, 56), mode="bilinear", align_corners=False)
            expected += resized.exp() / resized.exp().sum(dim=1, keepdim=True) / 4
    views = Views(short_px=48, long_px=70, scales=(1.0, 2.0), flips=True)
    found = torch.stack(list(class_probabilities(coarse, images, views)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_sizes_keep_the_aspect_within_the_longest_side() -> None:
    assert scaled_size((480, 640), 512, 2048, 1.0) == (512, math.floor(640 * 512 / 480 + 0.5)) == (512, 683)
    assert scaled_size((100, 1000), 512, 2048, 1.0) == (205, 2048)
    assert scaled_size((100, 1000), 512, 2048, 0.5) == (102, 1024)
    assert scaled_size((480, 640), None, None, 1.0) == (480, 640)
    assert scaled_size((480, 640), None, 320, 1.0) == (240, 320)
    assert scaled_size((1, 9), None, None, 0.1) == (1, 1)


def test_settings_of_windows_that_cannot_be_are_refused() -> None:
    assert Views.of(InferenceConfig(), own_px=(64, 64)).window_px == (64, 64)
    with pytest.raises(ConfigError, match="give window_px too"):
        Views.of(InferenceConfig(stride_px=(8, 8)))
    with pytest.raises(ConfigError, match="steps over pixels"):
        Views.of(InferenceConfig(window_px=(32, 32), stride_px=(32, 33)))
