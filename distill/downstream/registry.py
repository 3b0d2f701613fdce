"""All downstream tasks by name: those on frozen features, and those that train."""

from __future__ import annotations

from typing import Any

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.frozen import knn, probe, readout
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.registry import TUNED_TASKS
from dtpipe.manifests.errors import ConfigError

FROZEN_TASKS = {task.name: task for task in (probe.TASK, knn.TASK, readout.TASK)}
TASKS: dict[str, Task | TunedTask[Any]] = {**FROZEN_TASKS, **TUNED_TASKS}


def find_frozen(name: str) -> Task:
    """The task on frozen features of a name. Raises: ConfigError listing the choices."""
    if name not in FROZEN_TASKS:
        raise ConfigError(f"no task on frozen features is called {name!r}; choose one of {', '.join(FROZEN_TASKS)}")
    return FROZEN_TASKS[name]


def find_task(name: str) -> Task | TunedTask[Any]:
    """The task of a name. Raises: ConfigError listing the choices."""
    if name not in TASKS:
        raise ConfigError(f"downstream task {name!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]
