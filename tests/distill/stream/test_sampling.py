"""Passes over weighted rows: the right number of each, fixed epoch sizes, other halves in other epochs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dtpipe.distill.stream.order import key_hashes
from dtpipe.distill.stream.sampling import Sampling, pass_hashes

HASHES = key_hashes([f"{idx}.png" for idx in range(60)])
ROWS = np.array([idx for idx in range(60) if idx % 7])


@settings(max_examples=60, deadline=None)
@given(first=st.floats(0.05, 3.5), second=st.floats(0.05, 3.5), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_each_row_comes_floor_or_ceil_of_its_weight_and_the_epoch_has_its_size(first, second, seed, epoch):
    weights = np.where(ROWS < 30, first, second)
    sampling = Sampling(ROWS, 60, weights)
    entries = sampling.entries(HASHES, seed, epoch)
    rows, passes = sampling.split(entries)
    assert len(entries) == len(set(entries.tolist())) == sampling.epoch_size
    counts = Counter(rows.tolist())
    for row, weight in zip(ROWS, weights, strict=True):
        assert counts[row] in (int(np.floor(weight)), int(np.ceil(weight)))
        assert sorted(passes[rows == row].tolist()) == list(range(counts[row]))
    assert passes.max(initial=0) < sampling.max_passes
    if first != second:
        for weight, part in ((first, ROWS[ROWS < 30]), (second, ROWS[ROWS >= 30])):
            expected = len(part) * int(np.floor(weight)) + round((weight - np.floor(weight)) * len(part))
            assert sum(counts[row] for row in part) == expected


def test_without_weights_an_epoch_is_the_rows():
    sampling = Sampling(ROWS, 60)
    assert sampling.entries(HASHES, 3, 5).tolist() == ROWS.tolist()
    assert (sampling.epoch_size, sampling.max_passes) == (len(ROWS), 1)


def test_the_fraction_is_drawn_anew_in_each_epoch_and_evenly_over_them():
    sampling = Sampling(ROWS, 60, np.full(len(ROWS), 0.25))
    counts = Counter(row for epoch in range(400) for row in sampling.entries(HASHES, 1, epoch).tolist())
    assert set(counts) == set(ROWS.tolist())
    deviation = (400 * 0.25 * 0.75) ** 0.5
    assert all(abs(counts[row] - 100) < 6 * deviation for row in ROWS)
    assert sampling.entries(HASHES, 1, 0).tolist() != sampling.entries(HASHES, 2, 0).tolist()


def test_the_first_pass_has_the_keys_own_chances():
    """So that a run without weights takes the same views as before there were any."""
    passes = np.array([0, 1, 2] * 20)
    found = pass_hashes(HASHES, passes)
    assert np.array_equal(found[passes == 0], HASHES[passes == 0])
    assert len(set(found.tolist())) == 60
