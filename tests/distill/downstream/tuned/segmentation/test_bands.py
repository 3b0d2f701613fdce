"""A large image in bands has the probabilities of the whole image, and takes no more memory than was asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.tuned.segmentation import bands, network
from dtpipe.distill.downstream.tuned.segmentation.bands import band_rows, image_bytes, probability_bands
from dtpipe.distill.downstream.tuned.segmentation.inference import Views, class_probabilities
from dtpipe.distill.downstream.tuned.segmentation.network import build_upernet
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.manifests.labels import ClassTable
from parts.tuning import tune_config


def coarse(images: Tensor) -> Tensor:
    """Logits at a quarter of the size that depend on the place in the image or window."""
    rows = torch.arange(images.shape[-2], dtype=images.dtype)[:, None] * 0.1
    columns = torch.arange(images.shape[-1], dtype=images.dtype) * 0.1
    logits = torch.stack([images[:, 0] + rows, images[:, 1] * columns, images[:, 2] + images.mean()], dim=1)
    return F.avg_pool2d(logits, 4, ceil_mode=True)


@pytest.mark.parametrize("num_rows", [1, 7, 40, 53, 100])
@pytest.mark.parametrize(
    "views",
    [
        Views(),
        Views(scales=(0.5, 1.0, 1.75), flips=True),
        Views(window_px=(32, 32), stride_px=(21, 32)),
        Views(short_px=70, scales=(1.0, 0.6), flips=True, window_px=(32, 48)),
    ],
)
def test_bands_make_the_whole(views, num_rows) -> None:
    image = torch.rand(3, 53, 71, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    (whole,) = class_probabilities(coarse, image[None], views)
    parts = list(probability_bands(coarse, image, views, num_rows))
    assert [part.shape[1] for part in parts[:-1]] == [num_rows] * (len(parts) - 1)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-12)


def test_windows_that_touch_no_row_of_a_band_are_not_looked_through() -> None:
    num_seen = []

    def logits(images: Tensor) -> Tensor:
        num_seen.append(len(images))
        return images

    bands_of_image = probability_bands(
        logits, torch.zeros(3, 96, 32), Views(window_px=(32, 32), stride_px=(32, 32)), 32
    )
    next(bands_of_image)
    assert len(num_seen) == 1


def test_rows_fit_into_the_bytes_but_for_a_window() -> None:
    views = Views(window_px=(512, 512))
    assert (
        band_rows(150, 8000, Views()) * 8000 * 150 * 4 <= bands.MOST_BYTES < (band_rows(150, 8000, Views()) + 1) * 4.8e6
    )
    assert band_rows(150, 8000, views) == 512
    assert band_rows(10**9, 8000, Views()) == 1
    assert image_bytes(3, (10, 20), Views(scales=(1.0, 2.0), flips=True)) == 4 * 3 * (200 + 2 * 200 + 2 * 800)


def test_images_go_through_together_only_where_there_is_room(monkeypatch) -> None:
    """Four images of 64x64 and 2 classes: all at once, in twos, alone, and each in bands."""
    torch.manual_seed(0)
    student = build_student(StudentSpec("test_resnet", 4, (64, 64)))
    segmenter = build_upernet(student, ClassTable(("a", "b")), tune_config(head={"width": 8})).eval()
    images = list(torch.rand(4, 3, 64, 64) * 2 - 1)
    expected, own = segmenter.predict(images), image_bytes(2, (64, 64), Views())
    sizes: list[int] = []
    logits = segmenter.logits
    monkeypatch.setattr(segmenter, "logits", lambda batch: sizes.append(len(batch)) or logits(batch))
    for room, seen in ((4 * own, [4]), (2 * own + 1, [2, 2]), (own, [1] * 4), (own - 1, [1] * 4)):
        monkeypatch.setattr(network, "MOST_BYTES", room)
        monkeypatch.setattr(bands, "MOST_BYTES", room)
        sizes.clear()
        predictions = segmenter.predict(images)
        assert sizes == seen
        for prediction, other in zip(predictions, expected, strict=True):
            torch.testing.assert_close(prediction.foreground, other.foreground, rtol=1e-4, atol=1e-5)  # float32
            sure = abs(other.foreground - 0.5) > 1e-4
            assert (prediction.numbers == other.numbers)[sure].all()
