"""Batches of a teacher's training are functions of (seed, step, place)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dtpipe.distill.teacher.data import batches_ahead, draw_batch
from parts.ddpm_training import in_memory, numbered, tiny_teacher


def test_every_image_is_used_once_per_epoch():
    config = tiny_teacher(flip=False)
    drawn = torch.cat([draw_batch(config, numbered(8), step).clean[:, 0, 0, 0] for step in range(16)])
    rows = ((drawn + 1) * 127.5).round().int().tolist()
    for epoch in range(6):
        assert sorted(rows[epoch * 8 : epoch * 8 + 8]) == list(range(8))
    assert rows[:8] != rows[8:16]


def test_flips_are_drawn_per_image():
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[:, :, :8] = 255
    left = torch.cat([draw_batch(tiny_teacher(), in_memory(pixels), step).clean[:, 0, 0, 0] for step in range(40)]) > 0
    assert 0.3 < left.float().mean() < 0.7


@pytest.mark.parametrize("size", [2, 3, 5])
def test_parts_of_a_batch_are_the_whole_batch(size):
    config = tiny_teacher(batch_size=7, class_conditional=True, label_dropout=0.4)
    images = in_memory(numbered(8).pixels, np.arange(8) % 3, ("a", "b", "c"))
    whole = draw_batch(config, images, 4)
    cuts = [round(part * 7 / size) for part in range(size + 1)]
    parts = [draw_batch(config, images, 4, range(start, stop)) for start, stop in itertools.pairwise(cuts)]
    for name in ("clean", "timesteps", "noise", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_noise_is_standard_normal_and_differs_by_place_step_and_seed():
    config = tiny_teacher(batch_size=50)
    noise = draw_batch(config, numbered(8), 0).noise.double()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    others = [
        draw_batch(config, numbered(8), 1).noise,
        draw_batch(tiny_teacher(batch_size=50, seed=1), numbered(8), 0).noise,
    ]
    flat = torch.cat([noise.float(), *others]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 150


def test_timesteps_cover_the_schedule_evenly():
    config = tiny_teacher(batch_size=4000, px=8, channels=(8, 8, 8), timesteps=10)
    counts = np.bincount(draw_batch(config, numbered(1, 8), 0).timesteps.numpy(), minlength=10)
    assert (abs(counts - 400) < 5 * 400**0.5).all()


def test_a_share_of_the_classes_is_withheld():
    images = in_memory(numbered(8).pixels, np.arange(8) % 2, ("cat", "dog"))
    kept = draw_batch(tiny_teacher(batch_size=800, class_conditional=True), images, 0).labels
    some = draw_batch(tiny_teacher(batch_size=800, class_conditional=True, label_dropout=0.25), images, 0).labels
    withheld = some == 2  # the null class comes after all others
    assert set(kept.tolist()) == {0, 1}
    assert 0.2 < withheld.float().mean() < 0.3
    assert torch.equal(some[~withheld], kept[~withheld])


def test_a_batch_names_its_images_and_says_its_share():
    config = tiny_teacher(batch_size=4, flip=False)
    batch = draw_batch(config, numbered(8), 1, range(1, 4))
    rows = ((batch.clean[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert batch.keys == tuple(f"{row}.png" for row in rows)
    assert (batch.num_global, batch.weight, batch.last) == (4, 0.75, True)


def test_batches_that_are_drawn_ahead_are_those_of_their_steps():
    config = tiny_teacher(steps=6)
    ahead = list(batches_ahead(config, numbered(8), 2, range(3)))
    assert len(ahead) == 4
    assert all(
        torch.equal(batch.noise, draw_batch(config, numbered(8), 2 + at).noise) for at, batch in enumerate(ahead)
    )
