"""Extraction on Ray: one actor per GPU (or CPU share), each fed with shard numbers, none of them trusted to live.

The cluster may grow and shrink at any time. A shard is in at most one worker's hands as far as the driver knows; if the
driver is wrong (a worker thought dead still writes), commits are put-if-absent and the merge compares, so the
content stays right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dtpipe.extract.cluster.connection import ray_module
from dtpipe.extract.cluster.crew import PREPARE_CRASHES, Crew, Member
from dtpipe.extract.cluster.obstacles import first_line
from dtpipe.extract.cluster.placement import WorkerShape, live_nodes
from dtpipe.extract.config import ExtractRun
from dtpipe.extract.shards.progress import ProgressMeter
from dtpipe.extract.shards.queue import SHARDS_IN_HAND, ShardQueue, ShardTask
from dtpipe.extract.shards.task import ShardDroppedError, ShardSummary, WorkerContext
from dtpipe.manifests.errors import DtpipeError, IncompleteError
from dtpipe.manifests.stopping import StopRequest

REFRESH_S = 2.0  # between looks at which nodes there are
_TICK_S = 0.5


class Cluster:
    """Feeds the shards of a queue to actors until none is left, or a stop; one per run."""

    def __init__(
        self,
        settings: ExtractRun,
        context: WorkerContext,
        queue: ShardQueue,
        meter: ProgressMeter,
        on_shard: Callable[[ShardSummary], None],
        stop: StopRequest,
    ) -> None:
        gpus = settings.gpus_per_worker
        if gpus is None:
            gpus = float(context.device.startswith("cuda"))
        self._shape = WorkerShape(settings.cpus_per_worker, gpus)
        self._crew = Crew(context, self._shape, settings.workers)
        self._settings = settings
        self._queue, self._meter, self._on_shard, self._stop = queue, meter, on_shard, stop
        self._refreshed_s = float("-inf")
        self._last_worked_s = time.monotonic()

    def run(self) -> None:
        """Return when every shard was taken to its end or a stop was obeyed; failed shards are in the queue's list.

        Raises: what `ShardQueue.fail` raises; IncompleteError when no worker came up in time; the reason of a node's
        refusal when every node refused.
        """
        try:
            while not self._stop.requested and (len(self._queue) or self._crew.num_in_hand):
                self._refresh()
                self._feed()
                self._collect()
                self._check_deadlines()
                self._check_alive()
            self._drain()
        finally:
            for member in list(self._crew.members):
                self._crew.dismiss(member)

    # who works

    def _refresh(self) -> None:
        """See which nodes there are: let go of members on lost ones, start members where there is room."""
        if time.monotonic() - self._refreshed_s < REFRESH_S:
            return
        self._refreshed_s = time.monotonic()
        nodes = live_nodes(ray_module().nodes())
        for member in self._crew.stranded(nodes):
            self._lose(member, f"node {member.node.host} is gone", blame=False)
        self._crew.grow(nodes, len(self._queue) + self._crew.num_in_hand)

    def _lose(self, member: Member, why: str, *, blame: bool) -> None:
        """Give a member up and requeue what it had; with `blame` its shards count a failure and are tried alone."""
        tasks = self._crew.dismiss(member)
        for task in tasks:
            if blame:
                self._fail(task, why, alone=True)
            else:
                self._queue.put_back(task)
        lost = f"; shards {', '.join(str(task.shard_idx) for task in tasks)} go back to the queue" if tasks else ""
        self._meter.report(f"{why}{lost}")
        self._refreshed_s = float("-inf")

    def _leave_out(self, member: Member, error: BaseException) -> None:
        """Give a node no work: it failed the checks."""
        dismissed, reason = self._crew.leave_out(member, error)
        for other in dismissed:
            self._lose(other, f"node {member.node.host} is left out: {reason}", blame=False)

    # what they do

    def _feed(self) -> None:
        """Hand out shards, first to members with none; one that must be alone gets a member to itself."""
        ready = self._crew.ready
        for depth in range(SHARDS_IN_HAND):
            for member in ready:
                if len(member.in_hand) != depth or any(task.alone for task in member.in_hand.values()):
                    continue
                task = self._queue.take(share=depth > 0)
                if task is None:
                    break
                if not member.in_hand:
                    member.since_s = time.monotonic()
                member.in_hand[member.handle.extract.remote(task.shard_idx)] = task
        self._meter.workers = len(ready)

    def _collect(self) -> None:
        """Wait a little for answers and act on those that came."""
        ray = ray_module()
        for member in self._crew.members:
            if member.asked is None:
                member.asked = member.handle.news.remote()
        owners = {ref: member for member in self._crew.members for ref in member.references()}
        if not owners:
            time.sleep(_TICK_S)
            return
        urgent = [ref for ref, member in owners.items() if ref != member.asked] or list(owners)
        ray.wait(urgent, num_returns=1, timeout=_TICK_S)
        done, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for ref in done:
            if owners[ref] in self._crew.members:
                self._answer(owners[ref], ref)
        self._meter.encoded(self._crew.num_encoded, self._crew.stalls)
        self._meter.report()

    def _answer(self, member: Member, ref: Any) -> None:
        """One call of a member came back."""
        ray = ray_module()
        try:
            value = ray.get(ref)
        except ray.exceptions.RayTaskError as err:
            self._call_failed(member, ref, err.cause if isinstance(err.cause, BaseException) else err)
        except ray.exceptions.RayError as err:
            self._died(member, err)
        else:
            self._call_returned(member, ref, value)

    def _call_returned(self, member: Member, ref: Any, value: Any) -> None:
        if ref == member.preparing:
            member.preparing = None
            self._meter.worker_ready()
            self._meter.report(f"worker {value.pid} on {value.host} ({value.device}) is ready")
        elif ref == member.asked:
            member.asked, member.num_encoded, member.stalls = None, value.num_encoded, value.stalls
            for notice in value.notices:
                self._meter.report(f"worker on {member.node.host}: {notice}")
        else:
            del member.in_hand[ref]
            member.since_s = self._last_worked_s = time.monotonic()
            self._on_shard(value)

    def _call_failed(self, member: Member, ref: Any, error: BaseException) -> None:
        """A call raised.

        A member that failed in a way we did not foresee is replaced: its device may be in a bad state.
        """
        if ref == member.preparing:
            self._leave_out(member, error)
        elif ref in member.in_hand:
            task = member.in_hand.pop(ref)
            member.since_s = time.monotonic()
            if isinstance(error, ShardDroppedError):
                self._queue.put_back(task)
                return
            self._fail(task, error)
            if not isinstance(error, DtpipeError):
                why = f"worker on {member.node.host} is replaced after {type(error).__name__}"
                self._lose(member, why, blame=False)
        else:
            member.asked = None

    def _fail(self, task: ShardTask, error: BaseException | str, *, alone: bool = False) -> None:
        again = self._queue.fail(task, error, alone=alone)
        self._meter.report(task.failure(again))

    def _died(self, member: Member, error: Exception) -> None:
        """The process of a member is gone. With its node gone too, its shards are not to blame."""
        node_lives, host = self._crew.node_lives(member), member.node.host
        if node_lives and member.preparing is not None and self._crew.crashed_too_often(member):
            what = f"{PREPARE_CRASHES} workers died while loading the teacher ({first_line(error)})"
            self._leave_out(member, IncompleteError(f"node {host}: {what}"))
            return
        self._lose(member, f"worker on {host} died ({first_line(error)})", blame=node_lives)

    # what they may not do

    def _check_deadlines(self) -> None:
        """End members that have finished nothing for longer than a shard may take; the oldest shard is to blame."""
        now_s, limit_s = time.monotonic(), self._settings.shard_deadline_s
        late = [member for member in self._crew.members if member.in_hand and now_s - member.since_s > limit_s]
        for member in late:
            task = member.in_hand.pop(next(iter(member.in_hand)))
            self._fail(task, f"it took longer than extract.run.shard_deadline_s ({limit_s:g} s)", alone=True)
            why = f"worker on {member.node.host} was killed after {limit_s:g} s without a shard"
            self._lose(member, why, blame=False)

    def _check_alive(self) -> None:
        """Give up when nobody has been able to work for long.

        Raises: IncompleteError.
        """
        if self._crew.ready:
            self._last_worked_s = time.monotonic()
        elif time.monotonic() - self._last_worked_s > self._settings.worker_wait_s:
            raise IncompleteError(
                f"no worker was ready for {self._settings.worker_wait_s:g} s ({len(self._crew.members)} are starting, "
                f"each needs {self._shape.cpus:g} CPUs and {self._shape.gpus:g} GPUs); "
                f"check `ray status` and run the same command again"
            )

    def _drain(self) -> None:
        """After a stop: let nearly finished shards finish within the grace time."""
        for member in self._crew.members:
            if member.in_hand:
                member.handle.stop.remote()
        end_s = time.monotonic() + self._settings.stop_grace_s
        while self._crew.num_in_hand and time.monotonic() < end_s and not self._stop.urgent:
            self._collect()
