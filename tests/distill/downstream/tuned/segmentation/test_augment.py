"""Masks follow their images through every change, and what lies beside an image is ignored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.tuned.config import AugmentConfig, TuneConfig
from dtpipe.distill.downstream.tuned.segmentation.augment import FILL, largest_share, mask_augment
from dtpipe.distill.stream.batch import scaled
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Mask

CLASSES = ClassTable.numbered(200)


def views(num: int, image: np.ndarray, mask: np.ndarray, **settings):
    view = mask_augment(CLASSES, TuneConfig(steps=1, augment=AugmentConfig(**settings)))
    torch.manual_seed(0)
    return [view(image, Mask(mask)) for _ in range(num)]


def blocks(cells: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of squares whose grey is the class of their pixels."""
    numbers = np.kron(np.arange(cells * cells).reshape(cells, cells) * 3 + 5, np.ones((side, side), int))
    return np.repeat(numbers[..., None], 3, axis=2).astype(np.uint8), numbers.astype(np.uint8)


def test_masks_follow_scale_crop_and_flip() -> None:
    """At the middle of each square its grey is its class, whatever was done; edges are blurred in the image alone."""
    image, mask = blocks(6, 16)
    flips = set()
    for example in views(30, image, mask, crop_px=(80, 72), scale=(0.5, 2.0)):
        assert example.image.shape == (3, 80, 72) and example.image.dtype == torch.float32
        target = example.target["mask"]
        assert target.shape == (80, 72) and target.dtype == torch.int64
        grey = (example.image[0] + 1) * 127.5
        known = target != IGNORE
        assert torch.allclose(example.image[:, ~known], torch.tensor(FILL).float()[:, None] / 127.5 - 1)
        near = (grey - target)[known].abs() < 1
        assert near.float().mean() > 0.7  # all but edges
        row = target[:, 8:-8][8][target[:, 8:-8][8] != IGNORE]
        flips.add(bool(row[0] < row[-1]))
    assert flips == {True, False}


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    image, mask = blocks(4, 8)
    (example,) = views(1, image, mask, flip=0)
    assert torch.equal(example.image, scaled(torch.from_numpy(image)[None])[0])
    assert np.array_equal(example.target["mask"].numpy(), mask)


def test_short_sides_are_drawn_and_the_long_one_bounded() -> None:
    image, mask = np.zeros((20, 50, 3), np.uint8), np.zeros((20, 50), np.uint8)
    sizes = {tuple(example.image.shape[1:]) for example in views(20, image, mask, short_px=(10, 40), long_px=60)}
    assert sizes == {(10, 25), (24, 60)}


def test_crops_with_too_much_of_one_class_are_drawn_again() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), np.uint8)
    mask[24:40, 24:40] = 1
    image = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
    shares = [
        [largest_share(view.target["mask"]) for view in views(40, image, mask, crop_px=(16, 16), max_class_share=most)]
        for most in (1.0, 0.9)
    ]
    assert sum(share < 0.9 for share in shares[0]) < 20 < 35 < sum(share < 0.9 for share in shares[1])
    uniform = np.full((64, 64), 3, np.uint8)
    assert len(views(1, image, uniform, crop_px=(16, 16), max_class_share=0.75)) == 1  # it ends


def test_colours_change_the_image_alone() -> None:
    image, mask = blocks(4, 8)
    image[..., 1] //= 2
    seen = views(8, image, mask, photometric=True, flip=0)
    assert all(torch.equal(example.target["mask"], torch.from_numpy(mask).long()) for example in seen)
    assert len({float(example.image.mean()) for example in seen}) > 4
    assert all(example.image.min() >= -1 and example.image.max() <= 1 for example in seen)


def test_draws_are_those_of_the_global_generator() -> None:
    image, mask = blocks(4, 8)
    settings = {"crop_px": (16, 16), "scale": (0.8, 1.5), "photometric": True}
    first, again = (views(3, image, mask, **settings) for _ in range(2))
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(InputError, match="holds class 201, and there are 200 classes"):
        views(1, np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 201, np.uint8))
