"""Images of a teacher's training: what is loaded, what is refused, and that a batch is a function of (seed, step, place)."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpipe.extract import train_data as module
from dtpipe.extract.sources import folder as folder_source
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_data import TrainImages, draw_batch, load_images
from dtpipe.manifests.errors import ConfigError, ErrorBudgetError, InputError
from parts.paths import FIXTURES

TINY = json.loads((FIXTURES / "train" / "tiny.json").read_text())


def make(images: Path | str = "", **changes: object) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(TINY | {"images": str(images), "out": "nowhere"} | changes)


def numbered(num: int, px: int = 16) -> TrainImages:
    """Images whose every value is their number."""
    return TrainImages(np.arange(num, dtype=np.uint8)[:, None, None, None] * np.ones((1, px, px, 3), np.uint8))


def test_every_image_is_used_once_per_epoch():
    config = make(flip=False)
    drawn = torch.cat([draw_batch(config, numbered(8), step).clean[:, 0, 0, 0] for step in range(16)])
    rows = ((drawn + 1) * 127.5).round().int().tolist()
    for epoch in range(6):
        assert sorted(rows[epoch * 8 : epoch * 8 + 8]) == list(range(8))
    assert rows[:8] != rows[8:16]


def test_flips_are_drawn_per_image():
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    pixels[:, :, :8] = 255
    left = torch.cat([draw_batch(make(), TrainImages(pixels), step).clean[:, 0, 0, 0] for step in range(40)]) > 0
    assert 0.3 < left.float().mean() < 0.7


@pytest.mark.parametrize("size", [2, 3, 5])
def test_parts_of_a_batch_are_the_whole_batch(size):
    config = make(batch_size=7, class_conditional=True, label_dropout=0.4)
    images = TrainImages(numbered(8).pixels, np.arange(8) % 3, ("a", "b", "c"))
    whole = draw_batch(config, images, 4)
    cuts = [round(part * 7 / size) for part in range(size + 1)]
    parts = [draw_batch(config, images, 4, range(start, stop)) for start, stop in itertools.pairwise(cuts)]
    for name in ("clean", "timesteps", "noise", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_noise_is_standard_normal_and_differs_by_place_step_and_seed():
    config = make(batch_size=50)
    noise = draw_batch(config, numbered(8), 0).noise.double()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    others = [draw_batch(config, numbered(8), 1).noise, draw_batch(make(batch_size=50, seed=1), numbered(8), 0).noise]
    flat = torch.cat([noise.float(), *others]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 150


def test_timesteps_cover_the_schedule_evenly():
    config = make(batch_size=4000, px=8, channels=(8, 8, 8), timesteps=10)
    counts = np.bincount(draw_batch(config, numbered(1, 8), 0).timesteps.numpy(), minlength=10)
    assert (abs(counts - 400) < 5 * 400**0.5).all()


def test_a_share_of_the_classes_is_withheld():
    images = TrainImages(numbered(8).pixels, np.arange(8) % 2, ("cat", "dog"))
    kept = draw_batch(make(batch_size=800, class_conditional=True), images, 0).labels
    some = draw_batch(make(batch_size=800, class_conditional=True, label_dropout=0.25), images, 0).labels
    withheld = some == 2  # the null class comes after all others
    assert set(kept.tolist()) == {0, 1}
    assert 0.2 < withheld.float().mean() < 0.3
    assert torch.equal(some[~withheld], kept[~withheld])


def test_labels_are_the_class_folders(image_folder):
    images = load_images(make(image_folder, class_conditional=True))
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # by key: cat/001.png .. dog/006.png


def test_images_without_a_class_are_refused_by_name(image_folder):
    (image_folder / "stray.png").write_bytes((image_folder / "cat" / "001.png").read_bytes())
    with pytest.raises(
        InputError, match=r"9 of 9 images have no class, the first is cat/001\.png; put every image into a folder"
    ):
        load_images(make(image_folder, class_conditional=True))


def test_images_are_stretched_to_height_and_width(image_folder):
    images = load_images(make(image_folder, px=(8, 16), resize="stretch"))
    assert images.pixels.shape == (8, 8, 16, 3)
    with Image.open(image_folder / "cat" / "001.png") as first:
        np.testing.assert_array_equal(images.pixels[0], np.asarray(first.resize((16, 8), Image.Resampling.BICUBIC)))


def test_bad_images_are_named_and_left_out_of_pixels_and_labels(image_folder):
    whole = load_images(make(image_folder, class_conditional=True))
    (image_folder / "cat" / "004.png").write_bytes(b"no image")  # between 003 and 005
    found = load_images(make(image_folder, class_conditional=True, max_bad=1))
    np.testing.assert_array_equal(found.pixels, whole.pixels)
    assert found.labels.tolist() == whole.labels.tolist()
    assert len(found.bad) == 1
    assert found.bad[0].startswith("cat/004.png: ")


def test_more_bad_images_than_allowed_are_refused(image_folder):
    (image_folder / "cat" / "broken.png").write_bytes(b"no image")
    (image_folder / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(
        ErrorBudgetError,
        match=r"has 2 bad images, train_teacher\.max_bad allows 1 \(cat/broken\.png: .*; dog/empty\.png: ",
    ):
        load_images(make(image_folder, max_bad=0.1))
    assert len(load_images(make(image_folder, max_bad=0.2)).bad) == 2


def test_a_source_without_a_readable_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 1 images can be read; the first: a\.png"):
        load_images(make(tmp_path))


def test_images_that_do_not_fit_into_memory_are_refused_before_any_is_read(image_folder, monkeypatch):
    def read(*_: object) -> bytes:
        raise AssertionError("an image was read")

    monkeypatch.setattr(folder_source.FolderSource, "read", read)
    config = make(image_folder, px=1 << 20)
    with pytest.raises(
        ConfigError, match=r"8 images of 1048576x1048576 px need 24576\.0 GiB of memory, .* GiB are free; use fewer"
    ):
        load_images(config)
    with pytest.raises(ConfigError, match="in each of 4 processes need 98304"):
        load_images(config, copies=4)


@pytest.mark.parametrize(("limit", "refused"), [("6143\n", True), ("6144\n", False), ("max\n", False)])
def test_a_containers_memory_limit_counts(image_folder, tmp_path, monkeypatch, limit, refused):
    file = tmp_path / "memory.max"
    file.write_text(limit)
    monkeypatch.setattr(module, "_CGROUP_LIMIT", file)
    config = make(image_folder)  # 8 x 16 x 16 x 3 = 6144 bytes
    if refused:
        with pytest.raises(ConfigError, match="need"):
            load_images(config)
    else:
        assert len(load_images(config).pixels) == 8


def test_images_are_decoded_by_several_threads_in_the_listings_order(image_folder, monkeypatch):
    one = load_images(make(image_folder, decode_threads=1)).pixels
    meeting = threading.Barrier(4, timeout=10)  # passes only when four images are being read at once
    read = folder_source.FolderSource.read

    def read_together(source: folder_source.FolderSource, uri: str) -> bytes:
        meeting.wait()
        return read(source, uri)

    monkeypatch.setattr(folder_source.FolderSource, "read", read_together)
    np.testing.assert_array_equal(load_images(make(image_folder, decode_threads=4)).pixels, one)
