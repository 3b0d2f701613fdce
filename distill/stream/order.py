"""Which samples, flips and views a step sees: pure functions of (seed, epoch, key), of nothing else.

Neither the number of ranks nor where a run was interrupted changes what a global batch holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from dtpipe.distill.engine.seeds import mix
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import ViewSpec

MASK = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class StreamPosition:
    """The next global batch to deliver."""

    epoch: int = 0
    batch_idx: int = 0


@dataclass(frozen=True)
class Part:
    """Rows of one micro-batch: what a rank reads at once."""

    rows: np.ndarray
    epoch: int
    batch_idx: int
    num_global: int
    weight: float
    """Share of the global batch; 0 where a rank has no sample of it left and repeats one."""
    smallest: int
    """Samples in the smallest part of the global batch on any rank, so that all ranks treat their norms alike."""
    last: bool


@dataclass(frozen=True)
class SampleDraws:
    """What chance decides for some samples of an epoch; arrays of one length."""

    flip: np.ndarray
    """bool"""
    view: np.ndarray
    """int64, index on the V axis."""
    live: np.ndarray
    """bool: the teacher encodes this sample anew."""


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..num_samples-1, int64; equal on every machine.

    Sorting raw Philox output, not `Generator.permutation`: numpy promises only the former for all time.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_samples), kind="stable")


def num_batches(num_samples: int, batch_size: int) -> int:
    """Global batches of an epoch; the last may be smaller."""
    return -(-num_samples // batch_size)


def num_parts(num_samples: int, micro_batch: int | None, world: int) -> tuple[int, int]:
    """Micro-batches that every rank cuts its slice of a global batch into, and samples in the smallest of them all."""
    largest_slice = num_batches(num_samples, world)
    count = num_batches(largest_slice, micro_batch or largest_slice)
    return count, max(1, num_samples // world // count)


def cut(rows: np.ndarray, num_parts: int, idx: int) -> np.ndarray:
    """One of `num_parts` consecutive slices whose sizes differ by at most one."""
    size, extra = divmod(len(rows), num_parts)
    start = idx * size + min(idx, extra)
    return rows[start : start + size + (idx < extra)]


def epoch_parts(
    rows: np.ndarray,
    start: StreamPosition,
    seed: int,
    batch_size: int,
    micro_batch: int | None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Part]:
    """The parts of one epoch that a rank reads, from a position on.

    Each global batch is cut into one slice per rank, and that into as many micro-batches on every rank, whose sizes
    differ by at most one: ranks that wait for each other in a part have one each. A rank without samples for a part
    repeats the batch's last one with weight 0.
    """
    order = rows[epoch_order(len(rows), seed, start.epoch)]
    for batch_idx in range(start.batch_idx, num_batches(len(rows), batch_size)):
        batch = order[batch_idx * batch_size : (batch_idx + 1) * batch_size]
        mine = cut(batch, world, rank)
        count, smallest = num_parts(len(batch), micro_batch, world)
        for idx in range(count):
            part = cut(mine, count, idx)
            weight = len(part) / len(batch)
            part = part if len(part) else batch[-1:]
            yield Part(part, start.epoch, batch_idx, len(batch), weight, smallest, idx == count - 1)


def key_hashes(keys: Sequence[str]) -> np.ndarray:
    """64 bits of blake3 of each key, uint64; computed once per run."""
    digests = b"".join(blake3(key.encode()).digest(length=8) for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def draw_samples(
    hashes: np.ndarray, seed: int, epoch: int, views: Sequence[ViewSpec], flips: bool, live_share: float
) -> SampleDraws:
    """Flip, view and whether to encode anew, for samples given by the hashes of their keys.

    A flip has probability 1/2; a view is uniform among those with that flip, or among the unflipped where no flipped
    one is stored; `live_share` is the chance of a live one.
    """
    bits = mix(hashes ^ mix(np.array([seed % 2**64], np.uint64)) ^ mix(mix(np.array([epoch], np.uint64))))
    flip = (bits >> np.uint64(63)).astype(bool) & flips
    share = mix(bits)
    live = (share >> np.uint64(11)).astype(np.float64) / 2.0**53 < live_share
    uniform = (bits >> np.uint64(16)) & MASK
    view = np.where(flip, _pick(uniform, views, any(view.flip for view in views)), _pick(uniform, views, False))
    return SampleDraws(flip, view, live)


def _pick(uniform: np.ndarray, views: Sequence[ViewSpec], flip: bool) -> np.ndarray:
    matching = np.array([idx for idx, view in enumerate(views) if view.flip == flip], dtype=np.int64)
    if len(matching) == 0:
        return np.full(len(uniform), -1, dtype=np.int64)
    return matching[((uniform * np.uint64(len(matching))) >> np.uint64(32)).astype(np.int64)]


def use_flips(views: Sequence[ViewSpec], wanted: bool | None, where: str, otherwise: bool = False) -> bool:
    """Whether samples are flipped: as wanted, or, without a wish, when both flipped and unflipped views are stored.

    `otherwise` is true where features of flipped images can be had without stored ones.
    Raises: ConfigError when flips are wanted and cannot be had, or nothing unflipped is stored.
    """
    stored = {view.flip for view in views}
    if False not in stored:
        raise ConfigError(f"{where}: every stored view is of the flipped image; extract unflipped views too")
    if wanted and True not in stored and not otherwise:
        raise ConfigError(
            f"{where}: distill.flip is on and no flipped view is stored; features of a flipped image are not flipped "
            "features, so extract again with -s extract.noise.flips=true into a new output, leave distill.flip out, or "
            "mirror the stored features all the same with --equivariant"
        )
    return True in stored if wanted is None else wanted
