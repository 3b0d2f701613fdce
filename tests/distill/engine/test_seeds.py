"""Random numbers of a run are functions of (seed, step, rank)."""

from __future__ import annotations

from dtpipe.distill.engine.seeds import step_seed


def test_the_seed_of_a_step_differs_by_seed_step_and_rank():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 240
    assert all(0 <= seed < 2**63 for seed in seeds)
