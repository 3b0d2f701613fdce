"""`run_extraction`: the whole of `dtpipe extract`, from settings to a merged feature dataset.

Plan first, then shards, then the merge; each step is skipped where an earlier run finished it, so running the same
command again is how a broken run goes on.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dtpipe.extract.cluster.preflight import check_space, free_bytes, package_versions, recipe_bytes_per_sample
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.recipe import Resolved, resolve_recipe, with_whole_paths
from dtpipe.extract.shards.progress import BadSample, OnExtractProgress, ProgressMeter
from dtpipe.extract.shards.queue import ShardQueue
from dtpipe.manifests.errors import ErrorBudgetError, IncompleteError
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.schema import FLOAT32_ERROR, MEASURED_SHARD, Manifest, Plan
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.faults import FAULT_VARIABLE
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import (
    MANIFEST_FILE,
    commit_name,
    load_entries,
    load_entry,
    load_manifest,
    merge,
    pending_shards,
)
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import plan_digest, start_plan

MERGE_ROUNDS = 3  # the merge may send shards back to work; so often it is done here, then by running again


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
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """prepare, extract, merge: wall clock. wait_for_decode, teacher, write: sums over shards, which overlap; decode: over threads."""


def run_extraction(
    config: ExtractConfig, on_progress: OnExtractProgress | None = None, fresh: bool = False, command: str | None = None
) -> ExtractResult:
    """Write the feature dataset of `config`, or finish it. `command` is the command line, for the record in plan and manifest.

    Raises: DtpipeError of the kind that fits; StoppedError after SIGTERM or SIGINT.
    """
    extraction = _Extraction(config, on_progress, command)
    try:
        with extraction.stop:
            return extraction.run(fresh)
    finally:
        extraction.disconnect()


class _Extraction:
    """One run's state: what is planned, counted and timed."""

    def __init__(self, config: ExtractConfig, on_progress: OnExtractProgress | None, command: str | None) -> None:
        self.config, self.on_progress, self.command = with_whole_paths(config), on_progress, command
        self.stop = StopRequest()
        self.store = Store(config.run.out)
        self.started_s = time.monotonic()
        self.bad: list[BadSample] = []
        self.stage_seconds: Counter[str] = Counter()
        self.shards_written = self.rows_written = 0
        self.working_s = 0.0
        self._connected = False

    def run(self, fresh: bool) -> ExtractResult:
        """Plan, extract, merge."""
        resolved = resolve_recipe(self.config, fresh=fresh, cluster_has_gpus=self._cluster_has_gpus)
        self.stop.raise_if_requested(self.config.run.out)
        with Lock.acquire(self.store, self.config.run.lock_stale_s) as lock:
            plan, _ = start_plan(
                self.store, resolved.recipe, lambda: resolved.listing, self._provenance(), fresh, resolved.selection
            )
            self._timed("prepare", self.started_s)
            manifest = self._finished(plan) or self._extract_and_merge(plan, resolved, lock)
        return self._result(manifest)

    def _cluster_has_gpus(self) -> bool | None:
        """What the cluster says; None for a run without one."""
        if self.config.run.inline:
            return None
        from dtpipe.extract.cluster import ray as cluster

        self._connect()
        return cluster.has_gpus()

    def _connect(self) -> None:
        """Join or start Ray, only once something is to be done with it."""
        from dtpipe.extract.cluster import ray as cluster

        self._connected = cluster.connect(self.config.run.ray_address) or self._connected

    def disconnect(self) -> None:
        """Leave Ray, if this run joined it."""
        if self._connected:
            from dtpipe.extract.cluster import ray as cluster

            cluster.disconnect()

    def _finished(self, plan: Plan) -> Manifest | None:
        """The manifest, when there is nothing left to do."""
        if not self.store.exists(MANIFEST_FILE) or pending_shards(self.store, plan):
            return None
        manifest = load_manifest(self.store)
        if not manifest.complete:
            return None
        self._meter(plan).report("every shard was committed before")
        return manifest

    def _extract_and_merge(self, plan: Plan, resolved: Resolved, lock: Lock) -> Manifest:
        """Work until the merge finds every shard in its place."""
        if plan.recipe.shard.format == "zarr":
            write_zarr_metadata(self.store, plan)
        for merge_round in range(MERGE_ROUNDS):
            begun_s = time.monotonic()
            self._extract(plan, resolved, lock)
            self._timed("extract", begun_s)
            begun_s = time.monotonic()
            try:
                return merge(self.store, plan, lock, {**self._provenance(), **self._found(plan)})
            except IncompleteError as err:
                if merge_round == MERGE_ROUNDS - 1:
                    raise
                self._meter(plan).report(str(err))
            finally:
                self._timed("merge", begun_s)
        raise AssertionError("unreachable")

    def _extract(self, plan: Plan, resolved: Resolved, lock: Lock) -> None:
        """Write every shard that has no entry yet."""
        from dtpipe.extract.shards.worker import ShardSummary, WorkerContext

        pending = pending_shards(self.store, plan)
        meter = self._meter(plan)
        context = WorkerContext(
            out=self.store.url,
            images=self.config.images,
            num_samples=self.config.num_samples,
            source_kind=plan.recipe.source.kind,
            teacher=self.config.teacher,
            device=plan.recipe.compute.device,
            epoch=lock.epoch,
            max_bad=self.config.run.max_bad_samples(plan.num_rows),
            decode_threads=self.config.run.decode_threads,
            max_pixels=self.config.source.max_pixels,
            fault=os.environ.get(FAULT_VARIABLE),
            versions=package_versions(),
        )

        def on_shard(summary: ShardSummary) -> None:
            self._count(summary, meter, context.max_bad)

        self._check_budget(meter.num_bad, context.max_bad)
        if not pending:
            return
        check_space(self.store, plan)
        self._warn_of_space(plan, len(pending), meter)
        meter.report()
        queue = ShardQueue(pending, self.config.run.retries)
        try:
            self._work(context, resolved, queue, meter, on_shard)
        finally:
            self.working_s += meter.working_s
        self.stop.raise_if_requested(f"{self.store.url}: {meter.shards_done} of {meter.shards_total} shards committed")
        queue.raise_if_failed()

    def _work(self, context: Any, resolved: Resolved, queue: ShardQueue, meter: ProgressMeter, on_shard: Any) -> None:
        """Hand the queue to one worker here, or to a cluster of them."""
        if not self.config.run.inline:
            from dtpipe.extract.cluster.ray import Cluster

            self._connect()
            Cluster(self.config.run, context, queue, meter, on_shard, self.stop).run()
            return
        from dtpipe.extract.cluster.inline import run_inline
        from dtpipe.extract.shards.worker import ShardWorker

        worker = ShardWorker(context, resolved.teacher)
        try:
            run_inline(worker, queue, meter, on_shard, self.stop)
        finally:
            worker.close()

    def _count(self, summary: Any, meter: ProgressMeter, max_bad: int) -> None:
        """One shard is committed. Raises: ErrorBudgetError when the dataset now has too many bad samples."""
        self.shards_written += 1
        self.rows_written += summary.num_rows
        self.bad += summary.bad
        self.stage_seconds.update({name: value for name, value in summary.seconds.items() if name != "shard"})
        meter.committed(summary.num_rows, summary.num_bad, summary.size_bytes)
        meter.report()
        self._check_budget(meter.num_bad, max_bad)

    def _check_budget(self, num_bad: int, max_bad: int) -> None:
        from dtpipe.extract.shards.worker import budget_message

        if num_bad > max_bad:
            raise ErrorBudgetError(budget_message(self.store.url, num_bad, max_bad, self.bad))

    def _meter(self, plan: Plan) -> ProgressMeter:
        """Counts that begin with what is committed already; its bad samples are remembered too."""
        from dtpipe.extract.shards.worker import bad_samples

        entries = load_entries(self.store, plan, plan_digest(self.store), partial=True)
        bad = [each for entry in entries for each in bad_samples(entry.rows)]
        self.bad = list(bad)
        return ProgressMeter(
            shards_total=plan.num_shards,
            samples_total=plan.num_rows,
            shards_done=len(entries),
            samples_done=sum(len(entry.rows) for entry in entries),
            num_bad=len(bad),
            on_progress=self.on_progress,
        )

    def _warn_of_space(self, plan: Plan, num_pending: int, meter: ProgressMeter) -> None:
        free = free_bytes(self.store)
        needed = num_pending * plan.recipe.shard.samples * recipe_bytes_per_sample(plan.recipe)
        if free is not None and free < needed:
            meter.report(
                f"{self.store.url} has {free / 1e9:.1f} GB free; the shards to come need up to {needed / 1e9:.1f} GB before compression"
            )

    def _timed(self, stage: str, since_s: float) -> None:
        self.stage_seconds[stage] += time.monotonic() - since_s  # type: ignore[assignment]  # Counter of floats

    def _found(self, plan: Plan) -> dict[str, Any]:
        """What was measured on the way, for the manifest."""
        measured = {}
        if plan.recipe.compute.dtype != "float32" and self.store.exists(commit_name(MEASURED_SHARD)):
            entry = load_entry(self.store, plan, plan_digest(self.store), MEASURED_SHARD)
            measured = {FLOAT32_ERROR: entry.provenance.get(FLOAT32_ERROR, {})}
        return {"stage_seconds": dict(self.stage_seconds), **measured}

    def _provenance(self) -> dict[str, Any]:
        """Who wrote this, when, with what command and settings; kept beside the content and outside its digest."""
        return {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "versions": package_versions(),
            "command": self.command,
            "config": self.config.model_dump(mode="json"),
        }

    def _result(self, manifest: Manifest) -> ExtractResult:
        totals = manifest.totals
        return ExtractResult(
            url=self.store.url,
            digest=manifest.digest,
            num_rows=totals.num_rows,
            num_ok=totals.num_ok,
            num_bad=totals.num_bad,
            bad=self.bad,
            num_shards=totals.num_shards,
            shards_written=self.shards_written,
            size_bytes=totals.size_bytes,
            seconds=time.monotonic() - self.started_s,
            throughput_img_s=self.rows_written / self.working_s if self.working_s else 0.0,
            float32_error=manifest.provenance.get(FLOAT32_ERROR, {}),
            stage_seconds={name: round(value, 3) for name, value in self.stage_seconds.items()},
        )
