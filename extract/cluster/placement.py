"""How many workers each node of a Ray cluster gets: pure arithmetic on what the cluster says it has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_CPUS_PER_WORKER = 2  # without GPUs and without `workers`


@dataclass(frozen=True)
class Node:
    """A live node of the cluster and its total resources."""

    node_id: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class WorkerShape:
    """What Ray reserves for one worker."""

    cpus: float
    gpus: float


def live_nodes(ray_nodes: Sequence[Mapping[str, Any]]) -> list[Node]:
    """The answer of `ray.nodes()` as records, live nodes only, in an order that does not change."""
    nodes = [
        Node(
            node["NodeID"],
            node.get("NodeManagerHostname", "?"),
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray_nodes
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: node.node_id)


def slots(node: Node, shape: WorkerShape) -> int:
    """Workers that fit on an otherwise empty node."""
    fits = [int(has // needs) for has, needs in ((node.cpus, shape.cpus), (node.gpus, shape.gpus)) if needs > 0]
    return min(fits, default=0)


def most_workers(nodes: Sequence[Node], shape: WorkerShape, workers: int | None) -> int:
    """The cap on workers of the whole cluster: as asked; else one per GPU share, or one per two CPUs."""
    if workers is not None:
        return workers
    if shape.gpus > 0:
        return sum(slots(node, shape) for node in nodes)
    return max(1, math.floor(sum(node.cpus for node in nodes) / max(shape.cpus, DEFAULT_CPUS_PER_WORKER)))


def place_workers(nodes: Sequence[Node], shape: WorkerShape, cap: int) -> dict[str, int]:
    """Workers per node id, dealt round-robin until the cap or until every slot is taken."""
    free = {node.node_id: slots(node, shape) for node in nodes}
    placed = dict.fromkeys(free, 0)
    while sum(placed.values()) < cap and any(free.values()):
        for node_id in free:
            if free[node_id] and sum(placed.values()) < cap:
                free[node_id] -= 1
                placed[node_id] += 1
    return placed
