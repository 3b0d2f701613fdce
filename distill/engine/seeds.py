"""Random numbers of a run: functions of (seed, step, rank), so that a resumed run needs none of those drawn before."""

from __future__ import annotations

import numpy as np


def mix(bits: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit. uint64 -> uint64."""
    with np.errstate(over="ignore"):
        bits = bits + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator in one optimiser step of one rank."""
    bits = np.zeros(1, np.uint64)
    for value in (seed, step, rank):
        bits = mix(bits ^ np.array([value % 2**64], np.uint64))
    return int(bits[0] >> np.uint64(1))
