"""What a worker runs on rows: from their numbers to arrays of features.

A teacher over images is one; so can be anything that makes levels of rows. Worker, queue, cluster and commits know no
more of it than this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dtpipe.manifests.schema import IndexRow, Plan
from dtpipe.manifests.write.listing import Listing

if TYPE_CHECKING:
    from dtpipe.extract.encode import Encoded
    from dtpipe.manifests.codecs.base import LevelCodec
    from dtpipe.manifests.layout.arrays import ShardArrays


@dataclass(frozen=True)
class PreparedRow:
    """One row ready for its producer."""

    index: IndexRow
    """As it was given, with what was seen of the row: its original size, or why it is bad."""
    content: Any
    """What the producer needs of it; None of a bad row."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What of the time that it took went to `read`, `decode` and `noise`; the rest counts as decode."""


class Producer(Protocol):
    """Makes the levels of rows."""

    def prepare(self, index: IndexRow) -> PreparedRow:
        """All that is needed of one row, on the host; called from several threads, ahead of `produce`.

        Raises: InputError when it cannot be had for a reason that may pass; a bad row is a value, not an exception.
        """
        ...

    def produce(self, rows: Sequence[PreparedRow], batch_size: int) -> Encoded:
        """Levels of at most `batch_size` rows, one of which at least is good, in their order; images where they are
        made here. Fewer rows come out as if there were as many.

        Bad rows give something of the right shape. Shapes: -> {level: (B, V, C, h, w)}, images (B, H, W, 3) uint8 or
        None.
        """
        ...

    def measure(self, arrays: ShardArrays, codecs: Mapping[str, LevelCodec], batch_size: int) -> dict[str, Any]:
        """What is measured once per dataset, on the first rows of its first shard, for the record; `codecs` by
        level.
        """
        ...


class Job(Protocol):
    """How a worker comes by its producer; small, and travels to Ray workers."""

    def open(self, plan: Plan, listing: Listing, device: str) -> Producer:
        """Load and open what it takes. Raises: DtpipeError saying why this worker can do no work."""
        ...
