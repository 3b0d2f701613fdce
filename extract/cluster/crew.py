"""The actors of a run and the nodes they live on: who is started, who is left out, who is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dtpipe.extract.cluster.connection import ray_module
from dtpipe.extract.cluster.placement import Node, WorkerShape, live_nodes, most_workers, place_workers
from dtpipe.extract.shards.queue import ShardTask
from dtpipe.extract.shards.task import WorkerContext
from dtpipe.extract.shards.timeline import Stalls
from dtpipe.manifests.errors import DtpipeError, IncompleteError

PREPARE_CRASHES = 3  # a node on which so many workers died while preparing is left out


@dataclass(eq=False)
class Member:
    """One actor and what it has in hand."""

    handle: Any
    node: Node
    preparing: Any  # the reference of `prepare`, None once it has answered
    in_hand: dict[Any, ShardTask] = field(default_factory=dict)
    since_s: float = 0.0  # when the oldest shard in hand could begin; what the deadline counts from
    asked: Any = None  # the reference of `news`, None when not asked
    num_encoded: int = 0
    stalls: Stalls = field(default_factory=Stalls)
    name: str = ""

    def references(self) -> list[Any]:
        """All calls that have not come back."""
        return [ref for ref in (self.preparing, self.asked, *self.in_hand) if ref is not None]


class Crew:
    """The members there are, and the nodes that take none."""

    def __init__(self, context: WorkerContext, shape: WorkerShape, most: int | None) -> None:
        """`most`: members of the whole cluster; None: as its GPUs or CPUs say."""
        self._context, self._shape, self._most = context, shape, most
        self.members: list[Member] = []
        self._left_out: dict[str, DtpipeError] = {}  # node id -> why
        self._crashes: Counter[str] = Counter()
        self._encoded_by_gone = 0
        self._stalls_of_gone: dict[str, Stalls] = {}
        self._num_started = 0

    @property
    def ready(self) -> list[Member]:
        """Those that have their producer open."""
        return [member for member in self.members if member.preparing is None]

    @property
    def num_in_hand(self) -> int:
        """Shards that members have."""
        return sum(len(member.in_hand) for member in self.members)

    @property
    def num_encoded(self) -> int:
        """Rows produced by all members there have been."""
        return self._encoded_by_gone + sum(member.num_encoded for member in self.members)

    @property
    def stalls(self) -> dict[str, Stalls]:
        """Where the time of all members there have been went, by their names."""
        return {
            **self._stalls_of_gone,
            **{member.name: member.stalls for member in self.members if member.stalls.spans},
        }

    def stranded(self, nodes: Sequence[Node]) -> list[Member]:
        """Members whose node is not among the live ones."""
        alive = {node.node_id for node in nodes}
        return [member for member in self.members if member.node.node_id not in alive]

    def grow(self, nodes: Sequence[Node], num_shards: int) -> None:
        """Start members where there is room, no more than there are shards to do.

        Raises: the reason of a node's refusal when every node refused.
        """
        usable = [node for node in nodes if node.node_id not in self._left_out]
        if nodes and not usable:
            raise next(iter(self._left_out.values()))
        cap = min(most_workers(usable, self._shape, self._most), num_shards)
        have = Counter(member.node.node_id for member in self.members)
        placed = place_workers(usable, self._shape, cap)
        for node in usable:
            for _ in range(min(placed[node.node_id] - have[node.node_id], cap - len(self.members))):
                self._start(node)

    def _start(self, node: Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from dtpipe.extract.cluster.actor import CONCURRENT_CALLS, ExtractActor

        actor = (
            ray_module()
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
        self._num_started += 1
        name = f"worker {self._num_started} on {node.host}"
        self.members.append(Member(handle, node, preparing=handle.prepare.remote(), name=name))

    def dismiss(self, member: Member) -> list[ShardTask]:
        """End a member; what it had in hand."""
        self.members.remove(member)
        self._encoded_by_gone += member.num_encoded
        if member.stalls.spans:
            self._stalls_of_gone[member.name] = member.stalls
        ray_module().kill(member.handle)
        tasks, member.in_hand = list(member.in_hand.values()), {}
        return tasks

    def node_lives(self, member: Member) -> bool:
        """True while the cluster still has the member's node."""
        return member.node.node_id in {node.node_id for node in live_nodes(ray_module().nodes())}

    def crashed_too_often(self, member: Member) -> bool:
        """Count a member that died while preparing; True when its node is to get no more of them."""
        self._crashes[member.node.node_id] += 1
        return self._crashes[member.node.node_id] >= PREPARE_CRASHES

    def leave_out(self, member: Member, error: BaseException) -> tuple[list[Member], DtpipeError]:
        """Give the member's node no more members; those on it that are to go, and the reason."""
        host = member.node.host
        reason = (
            error
            if isinstance(error, DtpipeError)
            else IncompleteError(f"node {host}: {type(error).__name__}: {error}")
        )
        self._left_out[member.node.node_id] = reason
        on_node = [other for other in self.members if other.node == member.node]
        return [other for other in on_node if other is member or other.preparing is not None], reason
