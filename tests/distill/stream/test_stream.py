"""The stream delivers each good row once per epoch, its image and levels of one view, and goes on where it stopped."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from dtpipe.distill.stream.batch import FeatureBatch, student_images
from dtpipe.distill.stream.live import LiveSamples
from dtpipe.distill.stream.order import StreamPosition, draw_samples, key_hashes
from dtpipe.distill.stream.sampling import Sampling
from dtpipe.distill.stream.stream import FeatureStream, StreamSettings
from dtpipe.manifests.errors import ConfigError, DamagedDataError, InputError
from dtpipe.manifests.read.source import read_image, read_level
from parts.memory import FLIPPED_VIEWS, PX, MemorySource

CPU = torch.device("cpu")


def settings(**changes: object) -> StreamSettings:
    base = {"levels": ("l2", "l4"), "seed": 3, "epochs": 2, "batch_size": 8, "micro_batch": 3}
    return StreamSettings(**{**base, **changes})


def row_of(key: str) -> int:
    return int(key[len("images/") : -len(".png")])


def content(batches: list[FeatureBatch]) -> list[tuple[int, int, tuple[str, ...], bytes]]:
    return [
        (b.epoch, b.batch_idx, b.keys, b.levels["l2"].numpy().tobytes() + b.images.numpy().tobytes()) for b in batches
    ]


def test_each_epoch_holds_every_good_row_once_and_no_bad_one(source):
    batches = list(FeatureStream(source, settings(), CPU).batches(StreamPosition()))
    for epoch in (0, 1):
        rows = [row_of(key) for batch in batches if batch.epoch == epoch for key in batch.keys]
        assert sorted(rows) == source.columns.ok_rows.tolist()
    assert [b.keys for b in batches if b.epoch == 0] != [b.keys for b in batches if b.epoch == 1]


def test_a_batch_holds_what_the_source_holds(source):
    batch = next(FeatureStream(source, settings(), CPU).batches(StreamPosition()))
    assert batch.images.dtype == torch.uint8
    assert set(batch.levels) == {"l2", "l4"}
    for idx, key in enumerate(batch.keys):
        row = row_of(key)
        assert np.array_equal(batch.images[idx].numpy(), read_image(source, row))
        assert np.array_equal(batch.levels["l4"][idx].numpy(), read_level(source, "l4", row))
        assert batch.labels[idx] == source.columns.labels[row]


def test_the_tail_is_smaller_and_micro_batches_add_up(source):
    batches = list(FeatureStream(source, settings(epochs=1), CPU).batches(StreamPosition()))
    assert [(b.batch_idx, len(b.keys), b.num_global, b.last) for b in batches] == [
        (0, 3, 8, False),
        (0, 3, 8, False),
        (0, 2, 8, True),
        (1, 3, 8, False),
        (1, 3, 8, False),
        (1, 2, 8, True),
        (2, 3, 3, True),
    ]


@pytest.mark.parametrize("position", [StreamPosition(0, 1), StreamPosition(1, 0), StreamPosition(1, 2)])
def test_a_stream_taken_up_anywhere_gives_the_rest(source, position):
    whole = list(FeatureStream(source, settings(), CPU).batches(StreamPosition()))
    rest = list(FeatureStream(source, settings(), CPU).batches(position))
    expected = [b for b in whole if (b.epoch, b.batch_idx) >= (position.epoch, position.batch_idx)]
    assert content(rest) == content(expected)


def test_the_position_after_a_batch_is_where_the_next_begins(source):
    stream = FeatureStream(source, settings(), CPU)
    ends = [batch for batch in stream.batches(StreamPosition()) if batch.last]
    assert [stream.after(batch) for batch in ends[:-1]] == [StreamPosition(b.epoch, b.batch_idx) for b in ends[1:]]
    assert stream.after(ends[-1]) == StreamPosition(2, 0)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 7)])
def test_reading_ahead_changes_nothing(source, threads, prefetch):
    plain = list(FeatureStream(source, settings(), CPU).batches(StreamPosition()))
    ahead = list(
        FeatureStream(source, settings(read_threads=threads, prefetch=prefetch), CPU).batches(StreamPosition())
    )
    assert content(ahead) == content(plain)


@pytest.mark.parametrize(("num_bytes", "most"), [(1, 1), (38_000, 3), (10**9, 9)])
def test_no_more_is_read_ahead_than_fits_the_memory_for_it(source, num_bytes, most):
    # an image of 3,072 bytes and levels of 6x8x8 and 10x2x2 float16: 3,920 a sample, in parts of 3 and 2
    stream = FeatureStream(source, settings(prefetch=9, prefetch_bytes=num_bytes, read_threads=3), CPU)
    batches = stream.batches(StreamPosition())
    for consumed in range(1, 5):
        next(batches)
        time.sleep(0.05)
        assert len(source.reads) == consumed + most
    batches.close()
    plain = list(FeatureStream(source, settings(), CPU).batches(StreamPosition()))
    assert content(list(stream.batches(StreamPosition()))) == content(plain)


def test_two_ranks_see_the_samples_of_one(source):
    whole = FeatureStream(source, settings(epochs=1), CPU).batches(StreamPosition())
    ranks = [
        FeatureStream(source, settings(epochs=1, rank=rank, world=2), CPU).batches(StreamPosition())
        for rank in range(2)
    ]
    by_batch: dict[int, list[str]] = {}
    for batch in (batch for rank in ranks for batch in rank):
        by_batch.setdefault(batch.batch_idx, []).extend(batch.keys)
    expected: dict[int, list[str]] = {}
    for batch in whole:
        expected.setdefault(batch.batch_idx, []).extend(batch.keys)
    assert by_batch == expected


def test_flipped_views_come_with_flipped_images():
    source = MemorySource(views=FLIPPED_VIEWS)
    stream = FeatureStream(source, settings(epochs=6, micro_batch=None), CPU)
    seen = set()
    for batch in stream.batches(StreamPosition()):
        for idx, key in enumerate(batch.keys):
            row, level = row_of(key), batch.levels["l2"][idx].numpy()
            view = next(v for v in range(4) if np.array_equal(level, read_level(source, "l2", row, v)))
            stored = read_image(source, row)
            shown = stored[:, ::-1] if FLIPPED_VIEWS[view].flip else stored
            assert np.array_equal(batch.images[idx].numpy(), shown)
            seen.add(view)
    assert seen == {0, 1, 2, 3}


def test_flips_without_flipped_views_are_refused(source):
    with pytest.raises(ConfigError, match="no flipped view is stored"):
        FeatureStream(source, settings(flip=True), CPU)


def test_a_dataset_without_good_rows_is_refused():
    with pytest.raises(InputError, match="no good row"):
        FeatureStream(MemorySource(num_rows=2, bad=(0, 1)), settings(), CPU)


def test_damage_found_by_a_reading_thread_reaches_the_loop(source, monkeypatch):
    def damaged(*_args: object, **_kwargs: object) -> None:
        raise DamagedDataError("shard 00003, level l2, images/003.png: checksum differs")

    monkeypatch.setattr(source, "read", damaged)
    with pytest.raises(DamagedDataError, match="level l2"):
        next(FeatureStream(source, settings(), CPU).batches(StreamPosition()))


def test_closing_the_iterator_ends_its_threads(source):
    batches = FeatureStream(source, settings(), CPU).batches(StreamPosition())
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dtpipe-read")]


class FakeTeacher:
    """Live levels that tell which fresh draw they were made for, and calls that tell what they were asked."""

    makes_images = False

    def __init__(self, source: MemorySource) -> None:
        self.source = source
        self.threads: set[str] = set()
        self.asked: list[tuple[str, int, bool, int]] = []

    def prepare(self, samples: LiveSamples) -> list[str]:
        self.threads.add(threading.current_thread().name)
        return list(samples.keys)

    def encode(self, images, samples, prepared):
        assert list(samples.keys) == prepared
        assert threading.current_thread() is threading.main_thread()
        for image, key in zip(images, samples.keys, strict=True):  # as stored: uint8, unflipped
            assert np.array_equal(image.numpy(), read_image(self.source, row_of(key)))
        self.asked += zip(
            samples.keys, samples.views.tolist(), samples.flip.tolist(), samples.fresh.tolist(), strict=True
        )
        values = torch.from_numpy(1000.0 + samples.fresh).float().view(-1, 1, 1, 1)
        return images, {
            spec.name: values.expand(-1, spec.channels, spec.height, spec.width) for spec in self.source.levels
        }


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_live_samples_come_in_the_same_batches_with_a_fresh_draw_per_epoch(share):
    source = MemorySource(views=FLIPPED_VIEWS)
    teacher = FakeTeacher(source)
    batches = list(
        FeatureStream(source, settings(reencode=share, micro_batch=None), CPU, teacher).batches(StreamPosition())
    )
    stored = list(FeatureStream(source, settings(micro_batch=None), CPU).batches(StreamPosition()))
    num_live = 0
    for batch, plain in zip(batches, stored, strict=True):
        assert sorted(batch.keys) == sorted(plain.keys)
        for idx, key in enumerate(batch.keys):
            same = plain.keys.index(key)
            assert torch.equal(batch.images[idx], plain.images[same])  # flipped or not, as the stored view would be
            live = batch.levels["l2"][idx].flatten()[0].item() >= 1000
            num_live += live
            expected = (
                torch.full_like(plain.levels["l4"][same], 1000 + batch.epoch) if live else plain.levels["l4"][same]
            )
            assert torch.equal(batch.levels["l4"][idx].float(), expected.float())
    assert num_live == 38 if share == 1 else 8 < num_live < 30
    assert num_live == len(teacher.asked)
    assert all(FLIPPED_VIEWS[view].flip == flip for _, view, flip, _ in teacher.asked)
    assert all(name.startswith("dtpipe-read") for name in teacher.threads)  # noise is drawn ahead
    assert share < 1 or all(levels == [] for _, levels, _ in source.reads[: len(batches)])  # nothing is read in vain


def test_live_features_do_not_depend_on_the_stored_ones_beside_them():
    """Stored levels are float16 here; a live one stays as exact as the teacher made it, in any company."""
    source = MemorySource()

    class Exact(FakeTeacher):
        def encode(self, images, samples, prepared):
            values = torch.tensor([0.1 + row_of(key) for key in samples.keys]).view(-1, 1, 1, 1)
            return images, {
                spec.name: values.expand(-1, spec.channels, spec.height, spec.width) for spec in source.levels
            }

    for micro_batch in (1, 3, None):
        num_exact = 0
        for batch in FeatureStream(
            source, settings(reencode=0.5, micro_batch=micro_batch, epochs=1), CPU, Exact(source)
        ).batches(StreamPosition()):
            made = torch.tensor([0.1 + row_of(key) for key in batch.keys]).view(-1, 1, 1, 1)
            num_exact += int((batch.levels["l2"] == made).flatten(1).all(dim=1).sum())
        assert num_exact == sum(live_rows(source))


def live_rows(source: MemorySource) -> list[bool]:
    """Which good rows are encoded anew in epoch 0 at a share of a half."""
    hashes = key_hashes([source.columns.keys[row] for row in source.columns.ok_rows])
    return draw_samples(hashes, settings().seed, 0, source.views, False, 0.5).live.tolist()


class PaintingTeacher(FakeTeacher):
    """Makes its own images, white ones with a black left column, and levels of which only the left column is not 0."""

    makes_images = True

    def encode(self, images, samples, prepared):
        made = torch.full((len(samples), PX, PX, 3), 255, dtype=torch.uint8)
        made[:, :, 0] = 0
        levels = {
            spec.name: torch.zeros(len(samples), spec.channels, spec.height, spec.width) for spec in self.source.levels
        }
        for level in levels.values():
            level[..., 0] = 1
        return made, levels


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_teacher_that_makes_images_gives_those_of_the_batch(share):
    source = MemorySource()
    live = 0
    for batch in FeatureStream(
        source, settings(reencode=share, micro_batch=None), CPU, PaintingTeacher(source)
    ).batches(StreamPosition()):
        made = (batch.images[:, :, 1:] == 255).flatten(1).all(dim=1)
        live += int(made.sum())
        for idx, key in enumerate(batch.keys):
            assert made[idx] or np.array_equal(batch.images[idx].numpy(), read_image(source, row_of(key)))
            assert bool(made[idx]) == (set(batch.levels["l2"][idx, ..., 0].flatten().tolist()) == {1.0})
    assert live == 38 if share == 1 else 8 < live < 30


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_equivariant_flips_mirror_stored_levels_and_let_the_teacher_see_the_flipped_image(share):
    source = MemorySource()
    teacher = FakeTeacher(source)
    stream = FeatureStream(
        source, settings(equivariant=True, reencode=share, epochs=4), CPU, teacher if share else None
    )
    flips = {True: 0, False: 0}
    for batch in stream.batches(StreamPosition()):
        for idx, key in enumerate(batch.keys):
            stored, level = read_image(source, row_of(key)), batch.levels["l2"][idx].numpy()
            flipped = not np.array_equal(batch.images[idx].numpy(), stored)
            assert np.array_equal(batch.images[idx].numpy(), stored[:, ::-1] if flipped else stored)
            if level.flatten()[0] >= 1000:
                assert (key, 0, flipped, batch.epoch) in teacher.asked
                continue
            expected = read_level(source, "l2", row_of(key))
            assert np.array_equal(level, expected[..., ::-1] if flipped else expected)
            flips[flipped] += 1
    assert min(flips.values()) > 8


def test_flips_need_no_stored_ones_when_every_sample_is_encoded_live():
    source = MemorySource()
    teacher = FakeTeacher(source)
    list(FeatureStream(source, settings(flip=True, reencode=1.0), CPU, teacher).batches(StreamPosition()))
    assert 8 < sum(flip for _, _, flip, _ in teacher.asked) < 30
    with pytest.raises(ConfigError, match="no flipped view is stored"):
        FeatureStream(source, settings(flip=True, reencode=0.9), CPU, teacher)
    with pytest.raises(ConfigError, match="no flipped view is stored"):  # nobody can flip what a GAN makes
        FeatureStream(source, settings(flip=True, reencode=1.0), CPU, PaintingTeacher(source))


def test_samples_with_weights_come_as_often_and_each_pass_has_chances_of_its_own():
    source = MemorySource(views=FLIPPED_VIEWS)
    weights = np.where(source.columns.ok_rows < 10, 2.0, 0.5)
    sampling = Sampling(source.columns.ok_rows, len(source.columns), weights)
    teacher = FakeTeacher(source)
    stream = FeatureStream(source, settings(reencode=1.0, epochs=2), CPU, teacher, sampling)
    batches = list(stream.batches(StreamPosition()))
    assert stream.epoch_size == 2 * 9 + 5
    for epoch in (0, 1):
        counts = Counter(row_of(key) for batch in batches if batch.epoch == epoch for key in batch.keys)
        assert [counts[row] for row in range(10) if row != 3] == [2] * 9
        assert sum(counts[row] for row in range(10, 21)) == 5
    fresh = [draw for key, _, _, draw in teacher.asked if key == "images/000.png"]
    assert sorted(fresh) == [0, 1, 2, 3]  # never the same noise twice
    flips = {key: {flip for other, _, flip, _ in teacher.asked if other == key} for key, *_ in teacher.asked}
    assert sum(len(each) for each in flips.values()) > len(flips) + 3


def test_a_weighted_stream_taken_up_anywhere_gives_the_rest(source):
    sampling = Sampling(source.columns.ok_rows, len(source.columns), np.full(len(source.columns.ok_rows), 1.3))
    make = lambda: FeatureStream(source, settings(), CPU, None, sampling)  # noqa: E731
    whole = list(make().batches(StreamPosition()))
    rest = list(make().batches(StreamPosition(1, 2)))
    assert content(rest) == content([b for b in whole if (b.epoch, b.batch_idx) >= (1, 2)])


def test_levels_that_the_live_teacher_does_not_give_are_refused(source):
    live = FakeTeacher(MemorySource(levels=source.levels[:2]))
    with pytest.raises(ConfigError, match=r"live teacher gives levels \['l2', 'l3'\], and \['l4'\] are regressed"):
        next(FeatureStream(source, settings(levels=("l2", "l4"), reencode=1.0), CPU, live).batches(StreamPosition()))


def test_live_encoding_without_a_teacher_is_refused(source):
    with pytest.raises(ConfigError, match=r"reencode is 0\.5 and no live teacher"):
        FeatureStream(source, settings(reencode=0.5), CPU)


def test_student_images_are_scaled_and_resized_with_antialiasing():
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    images[:, ::2] = 255  # stripes that a resize without antialiasing would alias
    full = student_images(images, (8, 8))
    assert (full.min().item(), full.max().item(), tuple(full.shape)) == (-1, 1, (1, 3, 8, 8))
    half = student_images(images, (2, 2))
    assert half.abs().max() < 0.2
