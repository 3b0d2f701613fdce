"""Settings of downstream tasks that were changed and that the chosen task never reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.registry import FROZEN_TASKS, TASKS
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.registry import TUNED_TASKS
from dtpipe.manifests.errors import ConfigError


def refuse_idle_settings(name: str, config: TuneConfig | ProbeConfig) -> None:
    """Refuse settings that are not as they are by default, that some tasks read, and the task of a name does not.

    Raises: ConfigError naming one, and the tasks that read it.
    """
    section = "tune" if isinstance(config, TuneConfig) else "probe"
    tasks: dict[str, Task] | dict[str, TunedTask[Any]] = TUNED_TASKS if section == "tune" else FROZEN_TASKS
    for key in changed_settings(config):
        readers = [other for other, task in tasks.items() if key in task.reads]
        if readers and key not in TASKS[name].reads:
            raise ConfigError(
                f"eval.{section}.{key} is for {_listed(readers)}, and {name} does not read it; leave it out"
            )


def changed_settings(config: BaseModel, above: str = "") -> Iterator[str]:
    """Dotted names of values that are not the default."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from changed_settings(value, f"{above}{name}.")
        elif value != field.get_default(call_default_factory=True):
            yield f"{above}{name}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
