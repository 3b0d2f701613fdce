"""All tasks that train backbone and head on labels, by name."""

from __future__ import annotations

from typing import Any

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.tasks import detect, fcn, few_labels, panoptic, segment

TUNED_TASKS: dict[str, TunedTask[Any]] = {
    task.name: task for task in (segment.TASK, fcn.TASK, few_labels.TASK, detect.TASK, panoptic.TASK)
}
