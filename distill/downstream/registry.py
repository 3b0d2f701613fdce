"""All downstream tasks on frozen features, by name."""

from __future__ import annotations

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.frozen import knn, probe, readout
from dtpipe.manifests.errors import ConfigError

TASKS = {task.name: task for task in (probe.TASK, knn.TASK, readout.TASK)}


def find_task(name: str) -> Task:
    """The task of a name. Raises: ConfigError listing the choices."""
    if name not in TASKS:
        raise ConfigError(f"downstream task {name!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]
