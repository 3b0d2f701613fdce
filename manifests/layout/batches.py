"""Which batch size made which shard: the recipe's, but for shards that a run made in smaller batches.

One rule: a record says it only where it is not the recipe's, so that most datasets say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dtpipe.manifests.schema import BatchRange, ShardEntry


def lower_batches(entries: Iterable[ShardEntry]) -> dict[int, int]:
    """By shard, of those that were made in smaller batches than the recipe says."""
    return {entry.shard: entry.batch_size for entry in entries if entry.batch_size is not None}


def batch_ranges(by_shard: Mapping[int, int]) -> tuple[BatchRange, ...]:
    """The same as ranges, in order: neighbours of one batch size are one range."""
    ranges: list[BatchRange] = []
    for shard_idx, batch_size in sorted(by_shard.items()):
        if ranges and (ranges[-1].last, ranges[-1].batch_size) == (shard_idx - 1, batch_size):
            ranges[-1] = ranges[-1].model_copy(update={"last": shard_idx})
        else:
            ranges.append(BatchRange(batch_size=batch_size, first=shard_idx, last=shard_idx))
    return tuple(ranges)


def batch_in(ranges: Iterable[BatchRange], shard_idx: int) -> int | None:
    """The batch size of one shard; None: the recipe's."""
    return next((same.batch_size for same in ranges if same.first <= shard_idx <= same.last), None)
