"""What one run of an extraction did: counted, timed, and held against its budget of bad samples."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dtpipe.extract.shards.advice import advice
from dtpipe.extract.shards.progress import OnExtractProgress, ProgressMeter
from dtpipe.extract.shards.task import BadSample, ShardSummary, bad_samples, budget_message
from dtpipe.extract.shards.timeline import Stalls
from dtpipe.manifests.errors import ErrorBudgetError
from dtpipe.manifests.schema import FLOAT32_ERROR, Manifest, Plan, ShardEntry
from dtpipe.manifests.write.plan import SOURCE_SEEN


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction wrote, and where the time of this run went."""

    url: str
    digest: str
    num_rows: int
    num_ok: int
    num_bad: int
    bad: list[BadSample]  # the first few of each shard
    num_shards: int
    shards_written: int  # by this run
    size_bytes: int
    seconds: float
    throughput_img_s: float  # of this run's shards, from when the first worker was ready
    float32_error: dict[str, float] = field(default_factory=dict)
    """By level, where the teacher ran in lower precision; see `extract.precision`."""
    ignored: dict[str, int] = field(default_factory=dict)
    """What the source held that is no sample, when the dataset was planned: extension or why, to count."""
    source_change: str | None = None
    """What changed in the source since then."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """prepare, extract, merge: wall clock. All others are sums over shards, which overlap, or over threads; see
    `shards.timeline`."""
    stalls: dict[str, Stalls] = field(default_factory=dict)
    """Where the time of this run's workers went, by their names."""
    over_budget: str | None = None
    """What to say where the dataset takes more than the budget that its codecs were fitted for."""
    speed: str | None = None
    """What would make it faster; None where too little ran to tell."""


class Tally:
    """Counts and times of one run."""

    def __init__(self, url: str, on_progress: OnExtractProgress | None) -> None:
        self.url, self._on_progress = url, on_progress
        self.stage_seconds: defaultdict[str, float] = defaultdict(float)
        self._started_s = time.monotonic()
        self._bad: list[BadSample] = []
        self._shards_written = self._rows_written = 0
        self._working_s = 0.0
        self.remarks: list[str] = []
        """What to say as soon as the counts are known."""
        self.source_change: str | None = None
        self.meter = ProgressMeter(0, 0)
        self._stalls: dict[str, Stalls] = {}

    @property
    def stalls(self) -> dict[str, Stalls]:
        """Where the time of all workers of this run went, over all rounds."""
        later = self.meter.now().stalls
        both = {
            name: self._stalls.get(name, Stalls()) + later.get(name, Stalls()) for name in {**self._stalls, **later}
        }
        return dict(sorted(both.items()))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started_s

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self.stage_seconds[stage] += time.monotonic() - begun_s

    @contextmanager
    def working(self) -> Iterator[None]:
        """Workers are at work in this block."""
        try:
            yield
        finally:
            self._working_s += self.meter.working_s

    def begin(self, plan: Plan, entries: Iterable[ShardEntry]) -> ProgressMeter:
        """Count from what is committed already; its bad samples are remembered too."""
        shards_done, samples_done, self._stalls = 0, 0, self.stalls
        for entry in entries:
            self._bad += bad_samples(entry.rows)
            shards_done, samples_done = shards_done + 1, samples_done + len(entry.rows)
        self.meter = ProgressMeter(
            shards_total=plan.num_shards,
            samples_total=plan.num_rows,
            shards_done=shards_done,
            samples_done=samples_done,
            num_bad=len(self._bad),
            on_progress=self._on_progress,
        )
        for remark in self.remarks:
            self.meter.report(remark)
        self.remarks.clear()
        return self.meter

    def count(self, summary: ShardSummary, max_bad: int) -> None:
        """One shard is committed. Raises: ErrorBudgetError when the dataset now has too many bad samples."""
        self._shards_written += 1
        self._rows_written += summary.num_rows
        self._bad += summary.bad
        for stage, seconds in summary.seconds.items():
            self.stage_seconds[stage] += seconds
        self.meter.committed(summary.num_rows, summary.num_bad, summary.size_bytes)
        self.meter.report()
        self.check_budget(max_bad)

    def check_budget(self, max_bad: int) -> None:
        """Raises: ErrorBudgetError naming bad samples when there are too many."""
        if self.meter.num_bad > max_bad:
            raise ErrorBudgetError(budget_message(self.url, self.meter.num_bad, max_bad, self._bad))

    def result(self, manifest: Manifest) -> ExtractResult:
        """The end of a run."""
        totals = manifest.totals
        return ExtractResult(
            url=self.url,
            digest=manifest.digest,
            num_rows=totals.num_rows,
            num_ok=totals.num_ok,
            num_bad=totals.num_bad,
            bad=self._bad,
            num_shards=totals.num_shards,
            shards_written=self._shards_written,
            size_bytes=totals.size_bytes,
            seconds=self.elapsed_s,
            throughput_img_s=self._rows_written / self._working_s if self._working_s else 0.0,
            float32_error=manifest.provenance.get(FLOAT32_ERROR, {}),
            ignored=manifest.provenance.get("plan", {}).get(SOURCE_SEEN, {}).get("ignored", {}),
            source_change=self.source_change,
            stage_seconds={name: round(value, 3) for name, value in self.stage_seconds.items()},
            stalls=self.stalls,
            speed=advice(sum(self.stalls.values(), Stalls()), manifest.recipe),
        )
