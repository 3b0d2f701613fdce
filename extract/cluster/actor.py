"""The Ray actor: a `ShardWorker` behind four small methods. Only shard numbers go in and small records come out."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

from dtpipe.extract.allocator import keep_freed_memory
from dtpipe.extract.cluster.preflight import NodeReport, check_node, check_versions
from dtpipe.extract.shards.task import ShardSummary, WorkerContext, summarize
from dtpipe.extract.shards.timeline import Stalls
from dtpipe.extract.shards.worker import ShardWorker
from dtpipe.manifests.store.faults import arm_spec
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.plan import load_plan

CONCURRENT_CALLS = 4  # two shards, a look at progress, a stop
_KEPT_NOTICES = 100


@dataclass(frozen=True)
class News:
    """What a worker did and said since it was last asked."""

    num_encoded: int
    """Rows through the teacher since it began."""
    notices: tuple[str, ...]
    """Lines of its log, which would lie unseen in Ray's folders: a store that fails and is tried again, mostly."""
    stalls: Stalls = field(default_factory=Stalls)
    """Where its time went since it began."""


class _Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=_KEPT_NOTICES)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class ExtractActor:
    """Lives in a Ray worker process; `prepare` comes first."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._worker: ShardWorker | None = None
        self._keeper = _Keeper()
        logging.getLogger("dtpipe").addHandler(self._keeper)

    def prepare(self) -> NodeReport:
        """Check the node, then load the teacher and open source and dataset.

        Raises: DtpipeError saying why this node can do no work.
        """
        keep_freed_memory()
        check_versions(self._context.versions)  # first: other versions may not even read the plan
        if self._context.fault:
            arm_spec(self._context.fault)
        store = Store(self._context.out)
        report = check_node(store, load_plan(store), self._context.versions, self._context.device)
        self._worker = ShardWorker(self._context)
        return report

    def extract(self, shard_idx: int) -> ShardSummary:
        """Extract and commit one shard; two calls may run at once."""
        assert self._worker is not None, "prepare comes first"
        return summarize(self._worker.extract_shard(shard_idx))

    def news(self) -> News:
        """Progress and log since the last call; also while `prepare` runs."""
        lines = [self._keeper.lines.popleft() for _ in range(len(self._keeper.lines))]
        if self._worker is None:
            return News(0, tuple(lines))
        return News(self._worker.num_encoded, tuple(lines), self._worker.stalls())

    def stop(self) -> None:
        """Finish what is nearly done, drop the rest."""
        if self._worker:
            self._worker.request_stop()
