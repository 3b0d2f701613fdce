"""What goes to a worker and what comes back: small records without torch, which the driver, Ray and tests share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dtpipe.extract.shards.memory import DEFAULT_BYTES
from dtpipe.manifests.schema import IndexRow, ShardEntry
from dtpipe.manifests.words import count_of
from dtpipe.manifests.write.batches import PLANNED, BatchSizes

if TYPE_CHECKING:
    from dtpipe.extract.shards.producer import Job

MOST_CODE_THREADS = 16
NAMED_BAD = 20  # bad samples named per shard in its summary


class ShardDroppedError(Exception):
    """A stop was asked for and this shard was not nearly done; nothing of it was published."""


@dataclass(frozen=True)
class WorkerContext:
    """All that a worker needs besides what the dataset's plan says; small, and travels to Ray workers."""

    out: str
    job: Job
    device: str
    epoch: int
    max_bad: int  # bad samples that the whole dataset may have
    batch_sizes: BatchSizes = PLANNED
    decode_threads: int = 2
    code_threads: int | None = None  # None: by `threads_that_code`
    memory_bytes: int = DEFAULT_BYTES  # that shards on their way to the store may take
    fault: str | None = None  # armed fault hook, `name` or `name:n`
    versions: dict[str, str] = field(default_factory=dict)  # the driver's; every node must have the same


@dataclass(frozen=True)
class BadSample:
    """One sample that could not be encoded, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardSummary:
    """What the driver learns about a committed shard."""

    shard_idx: int
    num_rows: int
    num_bad: int
    bad: tuple[BadSample, ...]  # the first few
    size_bytes: int
    seconds: dict[str, float]
    """By span and by work of threads, see `timeline`."""


def bad_samples(rows: Sequence[IndexRow]) -> list[BadSample]:
    """The bad ones among index rows."""
    return [BadSample(row.key, row.status.removeprefix("bad: ")) for row in rows if row.status != "ok"]


def summarize(entry: ShardEntry) -> ShardSummary:
    """The small part of a shard's entry that the driver needs."""
    bad, seconds = bad_samples(entry.rows), entry.provenance.get("seconds", {})
    return ShardSummary(
        shard_idx=entry.shard,
        num_rows=len(entry.rows),
        num_bad=len(bad),
        bad=tuple(bad[:NAMED_BAD]),
        size_bytes=sum(stored.size_bytes for stored in entry.objects),
        seconds={**seconds.get("spans", {}), **seconds.get("work", {})},
    )


def threads_that_code(device: str) -> int:
    """Threads of one worker that make bytes: on a GPU's machine its share of the CPUs but for decoding, else two."""
    if not device.startswith("cuda"):
        return 2
    import torch

    share = (os.cpu_count() or 1) // max(1, torch.cuda.device_count())
    return max(2, min(MOST_CODE_THREADS, share // 2))


def budget_message(where: str, num_bad: int, max_bad: int, bad: Sequence[BadSample]) -> str:
    """What to say when the error budget for samples is exceeded."""
    named = "; ".join(f"{sample.key}: {sample.reason}" for sample in bad[:5])
    more = f"; and {num_bad - 5} more" if num_bad > 5 else ""
    return (
        f"{where} has {count_of(num_bad, 'bad sample')}, extract.run.max_bad allows {max_bad} "
        f"({named}{more}); mend the images, or run again with a larger --max-bad"
    )
