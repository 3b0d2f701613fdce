"""A tuned network from the folder of its training: backbone and head, ready to predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.network import classes_from_dict, resolve
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.trainer import TUNED_KIND
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.run_folder import read_config
from dtpipe.distill.student.student import build_student, spec_from_dict
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.labels import ClassTable


@dataclass(frozen=True)
class TunedModel:
    """What a training made."""

    task: TunedTask[Any]
    network: nn.Module
    """A `TaskNetwork` on the CPU, in eval mode."""
    classes: ClassTable
    config: TuneConfig
    """As the task takes it: the size of crops is set."""


def load_tuned(path: str | Path, ema: bool = True) -> TunedModel:
    """The network of a training's folder or checkpoint; with `ema`, the average of its weights where one was kept.

    A folder says how images were looked at last, which may have changed since the training.
    Raises: InputError when there is none; DamagedDataError when it cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return tuned_from_state(load_checkpoint(path, TUNED_KIND), path, ema)
    state = load_checkpoint(path / "last.pt", TUNED_KIND)
    latest = read_config(path, kind=TUNED_KIND)
    return tuned_from_state({**state, "config": latest}, path / "last.pt", ema)


def tuned_from_state(state: Mapping[str, Any], path: Path, ema: bool = True) -> TunedModel:
    """The same from the content of a checkpoint; `path` is named in errors."""
    try:
        task, classes = find_tuned(state["task"]), classes_from_dict(state["classes"])
        student = build_student(spec_from_dict(state["student_spec"]))
        config = resolve(task, student, TuneConfig.model_validate(state["config"]["tune"]))
        network = task.build(student, classes, config)
        average = state["ema"] if ema else None
        network.load_state_dict(state["network"] if average is None else average)
    except (KeyError, TypeError, ValueError, RuntimeError) as err:
        raise DamagedDataError(f"{path}: holds no tuned network ({err}); train again") from err
    return TunedModel(task, network.eval(), classes, config)
