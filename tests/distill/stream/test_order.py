"""Order, cuts, flips and views are pure functions of (seed, epoch, key)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtpipe.distill.stream.order import (
    StreamPosition,
    cut,
    draw_samples,
    epoch_order,
    epoch_parts,
    key_hashes,
    mix,
    use_flips,
)
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import ViewSpec

VIEWS = tuple(ViewSpec(draw=draw, timestep=50, flip=flip) for flip in (False, True) for draw in range(3))
UNFLIPPED = VIEWS[:3]
GOLDEN_ORDER = [0, 2, 1, 5, 4, 3, 6, 7]
GOLDEN_DRAWS = ([True, True, True], [5, 5, 3], [False, True, False])


def test_epoch_order_is_golden():
    """Equal on every machine and for every numpy: written down once."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == GOLDEN_ORDER
    assert epoch_order(8, seed=0, epoch=1).tolist() != GOLDEN_ORDER
    assert epoch_order(8, seed=1, epoch=0).tolist() != GOLDEN_ORDER


def test_draws_are_golden():
    draws = draw_samples(key_hashes(["cat/000.png", "dog/é.jpg", "z/000000042"]), 0, 3, VIEWS, True, 0.5)
    assert (draws.flip.tolist(), draws.view.tolist(), draws.live.tolist()) == GOLDEN_DRAWS


def test_mix_is_splitmix64():
    """The first outputs of the public reference (Vigna, splitmix64.c) from state 0."""
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(value) for value in mix(state).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@settings(max_examples=50, deadline=None)
@given(
    num=st.integers(1, 60),
    batch=st.integers(1, 25),
    micro=st.one_of(st.none(), st.integers(1, 25)),
    world=st.integers(1, 7),
)
def test_ranks_and_micro_batches_partition_the_same_global_batches(num, batch, micro, world):
    rows = np.arange(num) * 10
    whole = list(epoch_parts(rows, StreamPosition(2), 5, batch, None))
    assert sorted(np.concatenate([part.rows for part in whole]).tolist()) == rows.tolist()
    assert [len(part.rows) for part in whole[:-1]] == [batch] * (len(whole) - 1)
    for expected in whole:
        ranks = []
        for rank in range(world):
            parts = [
                p
                for p in epoch_parts(rows, StreamPosition(2), 5, batch, micro, rank, world)
                if p.batch_idx == expected.batch_idx
            ]
            assert [p.last for p in parts] == [False] * (len(parts) - 1) + [True]
            assert all(p.num_global == len(expected.rows) for p in parts)
            assert all(p.weight in (0, len(p.rows) / p.num_global) for p in parts)
            counted = [p.rows if p.weight else p.rows[:0] for p in parts]
            sizes = list(map(len, counted))
            assert max(sizes) - min(sizes) <= 1
            assert micro is None or max(sizes) <= micro
            assert all(len(p.rows) == 1 for p in parts if not p.weight)  # a repeated one that counts for nothing
            ranks.append((np.concatenate(counted), parts))
        assert np.concatenate([rows for rows, _ in ranks]).tolist() == expected.rows.tolist()
        assert max(len(rows) for rows, _ in ranks) - min(len(rows) for rows, _ in ranks) <= 1
        every = [part for _, parts in ranks for part in parts]
        assert len({len(parts) for _, parts in ranks}) == 1  # ranks wait for each other in every part
        assert {p.smallest for p in every} == {min(len(p.rows) for p in every)}


def test_three_runs_on_two_one_and_three_ranks_see_every_key_once_per_epoch():
    """Broken off in the middle of the first and of the second epoch."""
    rows, seen = np.arange(53) * 7, {0: Counter(), 1: Counter()}
    for start, end, world in [((0, 0), (0, 3), 2), ((0, 3), (1, 2), 1), ((1, 2), (2, 0), 3)]:
        for rank in range(world):
            for epoch in range(start[0], 2):
                at = StreamPosition(*start) if epoch == start[0] else StreamPosition(epoch)
                for part in epoch_parts(rows, at, 9, 10, 3, rank, world):
                    if (part.epoch, part.batch_idx) < end and part.weight:
                        seen[epoch].update(part.rows.tolist())
    assert seen == {0: Counter(rows.tolist()), 1: Counter(rows.tolist())}


def test_an_epoch_taken_up_in_the_middle_goes_on_with_the_same_batches():
    rows = np.arange(23)
    whole = list(epoch_parts(rows, StreamPosition(4), 1, 5, 2))
    rest = list(epoch_parts(rows, StreamPosition(4, 3), 1, 5, 2))
    tail = [part for part in whole if part.batch_idx >= 3]
    assert [part.rows.tolist() for part in rest] == [part.rows.tolist() for part in tail]


def test_cut_covers_everything_once():
    parts = [cut(np.arange(10), 4, idx).tolist() for idx in range(4)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert [len(cut(np.arange(2), 4, idx)) for idx in range(4)] == [1, 1, 0, 0]


def test_draws_depend_on_the_key_and_not_on_the_company_it_is_in():
    hashes = key_hashes([f"{idx}.png" for idx in range(100)])
    together = draw_samples(hashes, 7, 2, VIEWS, True, 0.3)
    for idx in (0, 13, 99):
        alone = draw_samples(hashes[idx : idx + 1], 7, 2, VIEWS, True, 0.3)
        assert (alone.flip[0], alone.view[0], alone.live[0]) == (
            together.flip[idx],
            together.view[idx],
            together.live[idx],
        )


def test_views_are_uniform_among_those_with_the_wanted_flip():
    hashes = key_hashes([f"{idx}.png" for idx in range(12_000)])
    draws = draw_samples(hashes, 0, 0, VIEWS, True, 0.25)
    assert all(VIEWS[view].flip == flip for view, flip in zip(draws.view, draws.flip, strict=True))
    counts = Counter(draws.view.tolist())
    assert all(abs(counts[view] - 2000) < 5 * (2000 * 5 / 6) ** 0.5 for view in range(6))  # five standard deviations
    assert abs(draws.live.mean() - 0.25) < 5 * (0.25 * 0.75 / 12_000) ** 0.5
    both = np.corrcoef(draws.flip, draws.live)[0, 1]
    assert abs(both) < 5 / 12_000**0.5


def test_epochs_and_seeds_draw_independently():
    hashes = key_hashes([f"{idx}.png" for idx in range(4000)])
    first = draw_samples(hashes, 0, 0, VIEWS, True, 0).flip
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        agree = (first == draw_samples(hashes, seed, epoch, VIEWS, True, 0).flip).mean()
        assert abs(agree - 0.5) < 5 * 0.5 / 4000**0.5


def test_without_flips_only_unflipped_views_are_seen():
    draws = draw_samples(key_hashes([f"{idx}" for idx in range(200)]), 0, 0, VIEWS, False, 0)
    assert not draws.flip.any()
    assert set(draws.view.tolist()) == {0, 1, 2}


def test_flips_are_used_when_stored_and_refused_when_not():
    assert use_flips(VIEWS, None, "d") is True
    assert use_flips(UNFLIPPED, None, "d") is False
    assert use_flips(VIEWS, False, "d") is False
    with pytest.raises(ConfigError, match=r"no flipped view is stored.*noise.flips=true"):
        use_flips(UNFLIPPED, True, "d")
    with pytest.raises(ConfigError, match="every stored view is of the flipped image"):
        use_flips(VIEWS[3:], None, "d")
