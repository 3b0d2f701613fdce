"""All tasks that train backbone and head on labels, by name."""

from __future__ import annotations

from typing import Any

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.tasks import detect, fcn, few_labels, finetune, linear, panoptic, segment
from dtpipe.manifests.errors import ConfigError

_DECLARED: tuple[TunedTask[Any], ...] = (
    *(finetune.TASK, linear.TASK),
    *(segment.TASK, fcn.TASK, few_labels.TASK),
    *(detect.TASK, panoptic.TASK),
)
TUNED_TASKS: dict[str, TunedTask[Any]] = {task.name: task for task in _DECLARED}


def find_tuned(name: str) -> TunedTask[Any]:
    """The tuned task of a name. Raises: ConfigError listing the choices."""
    if name not in TUNED_TASKS:
        raise ConfigError(f"tuned task {name!r} is unknown; choose one of {', '.join(TUNED_TASKS)}")
    return TUNED_TASKS[name]
