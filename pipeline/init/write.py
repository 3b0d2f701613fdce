"""`dtpipe init`: settings, a Slurm script and a Ray job of one project, with what a plan measured in their comments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.manifests.errors import ConfigError, StoreError
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.cli.console import format_bytes, format_seconds

if TYPE_CHECKING:
    from dtpipe.pipeline.plan.extraction import ExtractionPlan
    from dtpipe.pipeline.plan.training import TrainingPlan

_CONFIG, _SLURM, _RAY = "config.yaml", "slurm.sh", "ray.sh"
FEW_STEPS = 40  # an epoch of fewer gets smaller batches
PAPER_BATCH, _LEAST_BATCH = 256, 16
_PAPER_LR, _SMALL_LR = 4e-3, 1e-3
_SPARE = 1.5  # of the time that was planned
_UNKNOWN_HOURS = 24


@dataclass(frozen=True)
class Project:
    """What a project is about; places as they are to stand in its files."""

    folder: Path
    images: str
    teacher: str
    student: str
    px: int | None = None
    timesteps: tuple[int, ...] = ()
    flips: bool = False
    epochs: int = 100
    features: str = ""
    gpus: int = 1

    @property
    def data(self) -> str:
        """Where features go."""
        return self.features or str(self.folder / "features")

    def document(self, batch_size: int) -> dict[str, Any]:
        """The settings, as the file holds them, for a plan."""
        noise: dict[str, Any] = {"flips": self.flips} | ({"timesteps": self.timesteps} if self.timesteps else {})
        extract = {
            "images": self.images,
            "teacher": {"path": self.teacher},
            "transform": {} if self.px is None else {"px": self.px},
            "noise": noise,
            "run": {"out": self.data},
        }
        distill = {"student": {"name": self.student}, "epochs": self.epochs, "batch_size": batch_size}
        return {"extract": extract, "distill": distill}


def batch_size_for(num_samples: int | None) -> int:
    """The paper's 256 or, of few samples, the power of two that gives `FEW_STEPS` steps an epoch; 16 or more."""
    if num_samples is None:
        return PAPER_BATCH
    fitting = 1 << math.floor(math.log2(max(num_samples / FEW_STEPS, 1)))
    return max(_LEAST_BATCH, min(PAPER_BATCH, fitting))


def lr_for(batch_size: int) -> float:
    """The peak rate to begin with: the paper's for its batch."""
    return _PAPER_LR if batch_size == PAPER_BATCH else _SMALL_LR


def write_project(
    project: Project, num_samples: int | None, extraction: ExtractionPlan | None, training: TrainingPlan | None
) -> list[Path]:
    """Write the files of a project, with the figures of a plan where there is one.

    Raises: ConfigError when one of them is there already; StoreError when they cannot be written.
    """
    paths = {name: project.folder / name for name in (_CONFIG, _SLURM, _RAY)}
    refuse_existing(project.folder)
    values = _values(project, num_samples, extraction, training)
    try:
        project.folder.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            write_whole(path, _render(name, values).encode())
    except OSError as err:
        raise StoreError(f"{project.folder} cannot be written: {err}; choose another folder") from err
    return list(paths.values())


def refuse_existing(folder: Path) -> None:
    """Raises: ConfigError when the folder holds one of the files."""
    if there := [name for name in (_CONFIG, _SLURM, _RAY) if (folder / name).exists()]:
        raise ConfigError(f"{folder / there[0]} is there already; choose another folder, or move it away")


def _values(
    project: Project, num_samples: int | None, extraction: ExtractionPlan | None, training: TrainingPlan | None
) -> dict[str, Any]:
    batch_size = batch_size_for(num_samples)
    planned = [plan.seconds for plan in (extraction, training) if plan is not None]
    whole = len(planned) == 2
    few = "" if batch_size == PAPER_BATCH else f"; the paper's 256 gives {num_samples} samples few steps an epoch"
    return {
        "config": _word(project.folder / _CONFIG),
        "slurm": _word(project.folder / _SLURM),
        "ray": _word(project.folder / _RAY),
        "folder": _word(project.folder),
        "images": _scalar(project.images),
        "teacher": _scalar(project.teacher),
        "student": _scalar(project.student),
        "features": _scalar(project.data),
        "features_word": _word(project.data),
        "run": _scalar(str(project.folder / "run")),
        "px": project.px,
        "timesteps": list(project.timesteps),
        "flips": "true" if project.flips else "false",
        "epochs": project.epochs,
        "batch_size": batch_size,
        "batch_why": few,
        "lr": f"{lr_for(batch_size):.1e}",
        "figures": list(_figures(extraction, training)) or ["Nothing was measured: `dtpipe plan` does it."],
        "gpus": project.gpus,
        "cpus": 8 * project.gpus,
        "hours": math.ceil(_SPARE * sum(planned) / 3600) if whole else _UNKNOWN_HOURS,
        "time_why": "half as much again as the plan says" if whole else "a guess: nothing was measured",
    }


def _figures(extraction: ExtractionPlan | None, training: TrainingPlan | None) -> list[str]:
    """What a plan measured, for the comments."""
    lines = []
    if extraction is not None:
        lines += [
            f"Measured by `dtpipe plan`, on {extraction.num_probed} images:",
            f"  features: {extraction.num_samples} samples, about {format_bytes(extraction.stored_bytes)}; "
            f"{format_seconds(extraction.seconds)} on {extraction.workers} x {extraction.device}",
        ]
    if training is not None:
        lines.append(
            f"  training: {training.num_steps} steps, about {format_seconds(training.seconds)} on {training.device}; "
            f"{format_bytes(training.memory_bytes)} of memory with {training.timed_images} images at a time"
        )
    return lines


def _render(name: str, values: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dtpipe.pipeline.init"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(name).render(values)


def _scalar(text: str) -> str:
    """Text as YAML reads it: plain where it is plain, else in double quotes."""
    import yaml

    plain = _word(text) == text and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def _word(text: str | Path) -> str:
    import shlex

    return shlex.quote(str(text))


def timesteps_of(text: str | None) -> tuple[int, ...]:
    """`50,150` as numbers. Raises: ConfigError."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as err:
        raise ConfigError(f"--timesteps {text} are no whole numbers; write e.g. --timesteps 50") from err
