"""Extraction on Ray: one actor per GPU (or CPU share), each fed with shard numbers, none of them trusted to live.

The cluster may grow and shrink at any time. A shard is in at most one worker's hands as far as the driver knows; if the
driver is wrong (a worker thought dead still writes), commits are put-if-absent and the merge compares, so the
content stays right.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtpipe.extract.cluster.placement import Node, WorkerShape, live_nodes, most_workers, place_workers
from dtpipe.extract.config import ExtractRun
from dtpipe.extract.shards.progress import ProgressMeter
from dtpipe.extract.shards.queue import SHARDS_IN_HAND, ShardQueue, ShardTask
from dtpipe.extract.shards.worker import ShardDroppedError, ShardSummary, WorkerContext
from dtpipe.manifests.errors import DtpipeError, IncompleteError
from dtpipe.manifests.stopping import SIGNALS, StopRequest

REFRESH_S = 2.0  # between looks at which nodes there are
_TICK_S = 0.5
PREPARE_CRASHES = 3  # a node on which so many workers died while preparing is left out
CONNECT_S = 10.0  # for a cluster's first answer
_HOST_AND_PORT = re.compile(r"^(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)$")
OBJECT_STORE_BYTES = 128 * 1024**2  # of a local Ray; results are small and features never go there


def connect(address: str | None) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, or start a local one; False if this process was connected already.

    Raises: IncompleteError when Ray does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _ray()
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    check_answers(address)
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address == "local" else {}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as err:  # Ray raises bare exceptions as well
        what = "Ray does not start here" if address == "local" else f"the Ray cluster at {address} does not answer"
        raise IncompleteError(f"{what} ({_first_line(err)}); run again, or work without Ray: --inline") from err
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray sets one of its own, which would end the run at once
            signal.signal(number, handler)
    return True


def check_answers(address: str) -> None:
    """See that something listens at host:port, since Ray itself tries for minutes. Raises: IncompleteError."""
    found = _HOST_AND_PORT.match(address)
    if not found:  # `local`, `auto`: Ray knows
        return
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), CONNECT_S).close()
    except (OSError, OverflowError) as err:
        raise IncompleteError(
            f"the Ray cluster at {address} does not answer ({err}); "
            f"start it with `ray start --head`, or give no address to use this machine alone"
        ) from err


def disconnect() -> None:
    """Leave the cluster, and end it if it was started by `connect`."""
    _ray().shutdown()


def _ray() -> Any:
    """Ray, imported only when it is used; most of its functions have no types."""
    import ray

    return ray


def has_gpus() -> bool:
    """True if any node of the connected cluster has a GPU."""
    return any(node.gpus > 0 for node in live_nodes(_ray().nodes()))


@dataclass(eq=False)
class Member:
    """One actor and what it has in hand."""

    handle: Any
    node: Node
    preparing: Any  # the reference of `prepare`, None once it has answered
    in_hand: dict[Any, ShardTask] = field(default_factory=dict)
    since_s: float = 0.0  # when the oldest shard in hand could begin; what the deadline counts from
    counting: Any = None  # the reference of `num_encoded`, None when not asked
    num_encoded: int = 0


class Cluster:
    """Feeds the shards of a queue to actors until none is left, or a stop; one per run."""

    def __init__(
        self,
        run: ExtractRun,
        context: WorkerContext,
        queue: ShardQueue,
        meter: ProgressMeter,
        on_shard: Callable[[ShardSummary], None],
        stop: StopRequest,
    ) -> None:
        gpus = run.gpus_per_worker if run.gpus_per_worker is not None else float(context.device.startswith("cuda"))
        self._shape = WorkerShape(run.cpus_per_worker, gpus)
        self._run, self._context = run, context
        self._queue, self._meter, self._on_shard, self._stop = queue, meter, on_shard, stop
        self._members: list[Member] = []
        self._left_out: dict[str, DtpipeError] = {}  # node id -> why
        self._crashes: Counter[str] = Counter()
        self._refreshed_s = float("-inf")
        self._last_worked_s = time.monotonic()
        self._gone_encoded = 0

    def run(self) -> None:
        """Return when every shard was taken to its end or a stop was obeyed; failed shards are in the queue's list.

        Raises: what `ShardQueue.fail` raises; IncompleteError when no worker came up in time; the reason of a node's refusal
        when every node refused.
        """
        try:
            while not self._stop.requested and (len(self._queue) or self._busy()):
                self._refresh()
                self._feed()
                self._collect(_TICK_S)
                self._check_deadlines()
                self._check_alive()
            self._drain()
        finally:
            for member in list(self._members):
                self._kill(member)

    # who works

    def _refresh(self) -> None:
        """See which nodes there are: let go of members on lost ones, start members where there is room."""
        if time.monotonic() - self._refreshed_s < REFRESH_S:
            return
        self._refreshed_s = time.monotonic()
        ray = _ray()
        nodes = live_nodes(ray.nodes())
        alive = {node.node_id for node in nodes}
        for member in [each for each in self._members if each.node.node_id not in alive]:
            self._lose(member, f"node {member.node.host} is gone", blame=False)
        usable = [node for node in nodes if node.node_id not in self._left_out]
        if nodes and not usable:
            raise next(iter(self._left_out.values()))
        cap = min(most_workers(usable, self._shape, self._run.workers), len(self._queue) + self._busy())
        have = Counter(member.node.node_id for member in self._members)
        wanted = place_workers(usable, self._shape, cap)
        for node in usable:
            for _ in range(min(wanted[node.node_id] - have[node.node_id], cap - len(self._members))):
                self._start(node)

    def _start(self, node: Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from dtpipe.extract.cluster.actor import CONCURRENT_CALLS, ExtractActor

        actor = (
            _ray()
            .remote(ExtractActor)
            .options(
                num_cpus=self._shape.cpus,
                num_gpus=self._shape.gpus,
                max_concurrency=CONCURRENT_CALLS,
                max_restarts=0,  # replaced by us, so that its shards are requeued knowingly
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False),
            )
        )
        handle = actor.remote(self._context)
        self._members.append(Member(handle, node, preparing=handle.prepare.remote()))

    def _lose(self, member: Member, why: str, *, blame: bool) -> None:
        """Give a member up and requeue what it had; with `blame` its shards count a failure and are tried alone."""
        self._kill(member)
        tasks, member.in_hand = list(member.in_hand.values()), {}
        for task in tasks:
            if blame:
                self._fail(task, why, alone=True)
            else:
                self._queue.put_back(task)
        lost = f"; shards {', '.join(str(task.shard_idx) for task in tasks)} go back to the queue" if tasks else ""
        self._meter.report(f"{why}{lost}")
        self._refreshed_s = float("-inf")

    def _kill(self, member: Member) -> None:
        ray = _ray()
        self._members.remove(member)
        self._gone_encoded += member.num_encoded
        ray.kill(member.handle)

    # what they do

    def _busy(self) -> int:
        return sum(len(member.in_hand) for member in self._members)

    def _feed(self) -> None:
        """Hand out shards, first to members with none; one that must be alone gets a member to itself."""
        ready = [member for member in self._members if member.preparing is None]
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

    def _collect(self, timeout_s: float) -> None:
        """Wait a little for answers and act on those that came."""
        ray = _ray()
        for member in self._members:
            if member.preparing is None and member.counting is None:
                member.counting = member.handle.num_encoded.remote()
        owners = {ref: member for member in self._members for ref in _references(member)}
        if not owners:
            time.sleep(timeout_s)
            return
        urgent = [ref for ref, member in owners.items() if ref != member.counting] or list(owners)
        ray.wait(urgent, num_returns=1, timeout=timeout_s)
        done, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for ref in done:
            if owners[ref] in self._members:
                self._answer(owners[ref], ref)
        self._meter.encoded(self._gone_encoded + sum(member.num_encoded for member in self._members))
        self._meter.report()

    def _answer(self, member: Member, ref: Any) -> None:
        """One call of a member came back."""
        ray = _ray()
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
        elif ref == member.counting:
            member.counting, member.num_encoded = None, value
        else:
            del member.in_hand[ref]
            member.since_s = self._last_worked_s = time.monotonic()
            self._on_shard(value)

    def _call_failed(self, member: Member, ref: Any, error: BaseException) -> None:
        """A call raised. A member that failed in a way we did not foresee is replaced: its device may be in a bad state."""
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
                self._lose(
                    member, f"worker on {member.node.host} is replaced after {type(error).__name__}", blame=False
                )
        else:
            member.counting = None

    def _fail(self, task: ShardTask, error: BaseException | str, *, alone: bool = False) -> None:
        again = self._queue.fail(task, error, alone=alone)
        self._meter.report(
            f"shard {task.shard_idx} failed ({task.error}); {'it is tried again' if again else 'it is set aside'}"
        )

    def _died(self, member: Member, error: Exception) -> None:
        """The process of a member is gone. With its node gone too, its shards are not to blame."""
        ray = _ray()
        node_lives = member.node.node_id in {node.node_id for node in live_nodes(ray.nodes())}
        if node_lives and member.preparing is not None:
            self._crashes[member.node.node_id] += 1
            if self._crashes[member.node.node_id] >= PREPARE_CRASHES:
                reason = IncompleteError(
                    f"node {member.node.host}: {PREPARE_CRASHES} workers died while loading the teacher ({_first_line(error)})"
                )
                self._leave_out(member, reason)
                return
        self._lose(member, f"worker on {member.node.host} died ({_first_line(error)})", blame=node_lives)

    def _leave_out(self, member: Member, error: BaseException) -> None:
        """Give a node no work: it failed the checks."""
        reason = (
            error
            if isinstance(error, DtpipeError)
            else IncompleteError(f"node {member.node.host}: {type(error).__name__}: {error}")
        )
        self._left_out[member.node.node_id] = reason
        for each in [
            each
            for each in self._members
            if each.node == member.node and (each is member or each.preparing is not None)
        ]:
            self._lose(each, f"node {member.node.host} is left out: {reason}", blame=False)

    # what they may not do

    def _check_deadlines(self) -> None:
        """Kill members that have finished nothing for longer than a shard may take; the oldest shard is to blame."""
        now_s, limit_s = time.monotonic(), self._run.shard_deadline_s
        for member in [each for each in self._members if each.in_hand and now_s - each.since_s > limit_s]:
            oldest = next(iter(member.in_hand))
            task = member.in_hand.pop(oldest)
            self._fail(task, f"it took longer than extract.run.shard_deadline_s ({limit_s:g} s)", alone=True)
            self._lose(
                member, f"worker on {member.node.host} was killed after {limit_s:g} s without a shard", blame=False
            )

    def _check_alive(self) -> None:
        """Give up when nobody has been able to work for long.

        Raises: IncompleteError.
        """
        if any(member.preparing is None for member in self._members):
            self._last_worked_s = time.monotonic()
        elif time.monotonic() - self._last_worked_s > self._run.worker_wait_s:
            raise IncompleteError(
                f"no worker was ready for {self._run.worker_wait_s:g} s ({len(self._members)} are starting, each needs "
                f"{self._shape.cpus:g} CPUs and {self._shape.gpus:g} GPUs); check `ray status` and run the same command again"
            )

    def _drain(self) -> None:
        """After a stop: let nearly finished shards finish within the grace time."""
        for member in self._members:
            if member.in_hand:
                member.handle.stop.remote()
        end_s = time.monotonic() + self._run.stop_grace_s
        while self._busy() and time.monotonic() < end_s and not self._stop.urgent:
            self._collect(_TICK_S)


def _references(member: Member) -> Sequence[Any]:
    """All calls of a member that have not come back."""
    return [ref for ref in (member.preparing, member.counting, *member.in_hand) if ref is not None]


def _first_line(error: Exception) -> str:
    """Ray's messages run over many lines; the first says it."""
    return str(error).strip().split("\n", 1)[0][:200]
