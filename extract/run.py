"""`run_extraction`: the whole of `dtpipe extract`, from settings to a merged feature dataset; `run_work`: of anything
else that makes levels of rows.

Plan first, then shards, then the merge; each step is skipped where an earlier run finished it, so running the same
command again is how a broken run goes on.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dtpipe.extract.cluster.connection import Connection
from dtpipe.extract.cluster.preflight import check_space, package_versions, space_warning
from dtpipe.extract.cluster.ray import Cluster
from dtpipe.extract.config import ExtractConfig, ExtractRun
from dtpipe.extract.fitting.budget import over_budget
from dtpipe.extract.fitting.run import FitPlace, fit_before_plan
from dtpipe.extract.shards.progress import OnExtractProgress
from dtpipe.extract.shards.queue import ShardQueue
from dtpipe.extract.shards.task import WorkerContext
from dtpipe.extract.shards.timeline import STALLS
from dtpipe.extract.sources.names import ignored_text
from dtpipe.extract.tally import ExtractResult, Tally
from dtpipe.extract.work import Resolve, Work, refuse_lower_batch, teacher_work
from dtpipe.manifests.errors import IncompleteError
from dtpipe.manifests.fidelity import CODEC_ERROR, merged_records
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.schema import FLOAT32_ERROR, MEASURED_SHARD, CodecSpec, Manifest, Plan
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.faults import FAULT_VARIABLE
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.batches import BatchSizes, sizes_before
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
from dtpipe.manifests.write.plan import SOURCE_SEEN, find_plan, plan_digest, start_plan
from dtpipe.manifests.write.size import size_of

MERGE_ROUNDS = 3  # the merge may send shards back to work; so often it is done here, then by running again


@dataclass(frozen=True)
class _Run:
    """What the steps of one run share once its plan is written."""

    config: ExtractRun
    store: Store
    plan: Plan
    work: Work
    lock: Lock
    connection: Connection
    stop: StopRequest
    tally: Tally
    describe: Callable[[], dict[str, Any]]
    """Who writes this, for the record."""


def run_extraction(
    config: ExtractConfig, on_progress: OnExtractProgress | None = None, fresh: bool = False, command: str | None = None
) -> ExtractResult:
    """Write the feature dataset of `config`, or finish it. `command` is the command line, for the record in plan and
    manifest.

    Raises: DtpipeError of the kind that fits; StoppedError after SIGTERM or SIGINT.
    """
    resolve = partial(teacher_work, config)
    return run_work(config.run, resolve, config.model_dump(mode="json"), on_progress, fresh, command)


def run_work(
    config: ExtractRun,
    resolve: Resolve,
    settings: Mapping[str, Any],
    on_progress: OnExtractProgress | None = None,
    fresh: bool = False,
    command: str | None = None,
) -> ExtractResult:
    """Write the dataset that `resolve` says, or finish it. `settings` and `command` are for the record.

    Raises: as `run_extraction`.
    """
    store = Store(config.out)
    refuse_lower_batch(config, store, fresh)
    tally = Tally(store.url, on_progress)

    def describe() -> dict[str, Any]:
        return _provenance(settings, command)

    with Connection(config.ray_address) as connection, StopRequest() as stop:
        work = resolve(fresh=fresh, cluster_has_gpus=None if config.inline else connection.has_gpus)
        stop.raise_if_requested(config.out)
        with Lock.acquire(store, config.lock_stale_s) as lock:
            find_plan(store, fresh)
            work = fit_before_plan(work, store, FitPlace(config, connection, stop, on_progress))
            plan = _planned(store, work, tally, describe(), fresh)
            tally.stage_seconds["prepare"] = tally.elapsed_s
            run = _Run(config, store, plan, work, lock, connection, stop, tally, describe)
            manifest = _finished(run) or _write(run)
    budget_bytes = None if work.fit is None else work.fit.budget_bytes
    over = None if budget_bytes is None else over_budget(size_of(store, manifest), budget_bytes)
    return replace(tally.result(manifest), over_budget=over)


def _planned(store: Store, work: Work, tally: Tally, record: dict[str, Any], fresh: bool) -> Plan:
    """The plan, written or found, and what is to be said of the source."""
    census = work.census
    record |= work.record
    record |= {} if census is None else {SOURCE_SEEN: census.record()}
    plan, _ = start_plan(store, work.recipe, work.listing, record, fresh, work.selection)
    if census is None:
        tally.source_change = work.change(plan.provenance.get(SOURCE_SEEN, {}), store.url)
        tally.remarks += [tally.source_change] if tally.source_change else []
    elif census.ignored:
        tally.remarks.append(f"ignored: {ignored_text(census.ignored)}")
    return plan


def _finished(run: _Run) -> Manifest | None:
    """The manifest, when there is nothing left to do."""
    if not run.store.exists(MANIFEST_FILE) or pending_shards(run.store, run.plan):
        return None
    manifest = load_manifest(run.store)
    if not manifest.complete:
        return None
    _begin(run)
    run.tally.meter.report("every shard was committed before")
    return manifest


def _write(run: _Run) -> Manifest:
    """Work until the merge finds every shard in its place."""
    if run.plan.recipe.shard.format == "zarr":
        write_zarr_metadata(run.store, run.plan)
    for rounds_left in reversed(range(MERGE_ROUNDS)):
        with run.tally.timed("extract"):
            _work(run)
        with run.tally.timed("merge"):
            try:
                return merge(run.store, run.plan, run.lock, {**run.describe(), **_measured(run)})
            except IncompleteError as err:
                if not rounds_left:
                    raise
                _begin(run)
                run.tally.meter.report(str(err))
    raise AssertionError("unreachable")


def _work(run: _Run) -> None:
    """Write every shard that has no entry yet, here or on a cluster."""
    pending, max_bad = pending_shards(run.store, run.plan), _max_bad(run)
    _begin(run)
    run.tally.check_budget(max_bad)
    if not pending:
        return
    check_space(run.store, run.plan)
    if warning := space_warning(run.store, run.plan, len(pending)):
        run.tally.meter.report(warning)
    run.tally.meter.report()
    queue, meter = ShardQueue(pending, run.config.retries), run.tally.meter
    with run.tally.working():
        _hand_out(run, queue, max_bad)
    run.stop.raise_if_requested(f"{run.store.url}: {meter.shards_done} of {meter.shards_total} shards committed")
    queue.raise_if_failed()


def _max_bad(run: _Run) -> int:
    """Bad samples that there may be, with those known before."""
    before = run.work.num_bad_before
    return before + run.config.max_bad_samples(run.plan.num_rows - before)


def _begin(run: _Run) -> None:
    run.tally.begin(run.plan, load_entries(run.store, run.plan, plan_digest(run.store), partial=True))


def _hand_out(run: _Run, queue: ShardQueue, max_bad: int) -> None:
    """Give the shards to one worker here, or to a cluster of them."""
    from dtpipe.extract.cluster.inline import run_inline
    from dtpipe.extract.shards.worker import ShardWorker

    config = run.config
    context = WorkerContext(
        out=run.store.url,
        job=run.work.job,
        device=run.plan.recipe.compute.device,
        epoch=run.lock.epoch,
        max_bad=max_bad,
        batch_sizes=BatchSizes(
            config.lower_batch_to, sizes_before(run.store, run.plan, pending_shards(run.store, run.plan))
        ),
        decode_threads=config.decode_threads,
        code_threads=config.code_threads,
        memory_bytes=int(config.memory_gb * 1e9),
        fault=os.environ.get(FAULT_VARIABLE),
        versions=package_versions(),
    )
    count = partial(run.tally.count, max_bad=max_bad)
    if not config.inline:
        run.connection.join()
        Cluster(config, context, queue, run.tally.meter, count, run.stop).run()
        return
    worker = ShardWorker(replace(context, job=run.work.job_here))
    try:
        run_inline(worker, queue, run.tally.meter, count, run.stop)
    finally:
        worker.close()


def _measured(run: _Run) -> dict[str, Any]:
    """What was measured on the way, for the manifest."""
    measured: dict[str, Any] = {
        "stage_seconds": dict(run.tally.stage_seconds),
        STALLS: {name: stalls.record() for name, stalls in run.tally.stalls.items()},
    }
    if any(level.codec != CodecSpec() for level in run.plan.recipe.levels):
        entries = load_entries(run.store, run.plan, plan_digest(run.store))
        lost = merged_records(entry.provenance.get(CODEC_ERROR, {}) for entry in entries)
        measured |= {CODEC_ERROR: lost} if lost else {}
    if run.plan.recipe.compute.dtype != "float32" and run.store.exists(commit_name(MEASURED_SHARD)):
        entry = load_entry(run.store, run.plan, plan_digest(run.store), MEASURED_SHARD)
        measured[FLOAT32_ERROR] = entry.provenance.get(FLOAT32_ERROR, {})
    return measured


def _provenance(settings: Mapping[str, Any], command: str | None) -> dict[str, Any]:
    """Who wrote this, when, with what command and settings; kept beside the content and outside its digest."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "versions": package_versions(),
        "command": command,
        "config": dict(settings),
    }
