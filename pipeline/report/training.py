"""What a run's own records say: its settings, facts for the head of the page, and curves of its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.run_folder import read_config, read_metrics
from dtpipe.manifests.errors import DtpipeError, InputError
from dtpipe.pipeline.report import figures
from dtpipe.pipeline.report.section import LeaveOut, Section, render

Metrics = Sequence[Mapping[str, Any]]
R2 = "R² by level"
R2_MEANS = "R² of the regressor's output: 1 is the teacher's whitened level, 0 its mean over images, a constant."
MSE = "mse/"  # before the name of a level


def read_run_config(run: Path) -> DistillConfig:
    """The resolved settings of a run folder. Raises: InputError when there is none."""
    from pydantic import ValidationError

    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: no run of `dtpipe distill` is here (no config.yaml); give its --out folder")
    try:
        return DistillConfig.model_validate(DistillConfig.in_halves(read_config(run)))
    except ValidationError as err:
        raise InputError(
            f"{run}/config.yaml: not the settings of a run of this version: {err.errors()[0]['msg']}"
        ) from err


def run_metrics(run: Path, leave_out: LeaveOut) -> Metrics:
    """Lines of the run's metrics; none, with a note, where they are damaged."""
    try:
        return read_metrics(run)
    except DtpipeError as err:
        leave_out("training curves", err)
        return []


def facts_of(settings: DistillConfig, metrics: Metrics) -> dict[str, str]:
    """What stands at the head of the page."""
    facts = {"student": settings.student.name, "epochs": str(settings.epochs), "global batch": str(settings.batch_size)}
    if metrics:
        last = metrics[-1]
        facts |= {
            "steps": f"{last['step']} of {last['num_steps']}",
            "loss": f"{last['loss']:.3f}",
            "images per second": f"{last['throughput_img_s']:.0f}",
        }
    return facts


def training_section(metrics: Metrics, variances: Mapping[str, float]) -> Iterator[Section]:
    """Curves; nothing where there are none. Of levels R², by the variances of the teacher's, else the error."""
    if not metrics:
        return
    panels = {
        "loss": _panel(metrics, loss_names(metrics)),
        **level_lines(metrics, variances),
        "learning rate": _panel(metrics, ["lr"]),
    }
    curves = figures.curves({title: lines for title, lines in panels.items() if lines})
    said = f"{R2_MEANS if R2 in panels else ''} {_spent(metrics)}"
    yield Section("Training", render("training.html", figures=[curves], caption=said.strip()))


def loss_names(metrics: Metrics) -> list[str]:
    """`loss`, which is minimised, and its terms."""
    parts = dict.fromkeys(
        name.partition("/")[0] for name in metrics[0] if "/" in name and not name.startswith("share/")
    )
    return [name for name in ["loss", *parts] if name in metrics[0]]


def level_lines(metrics: Metrics, variances: Mapping[str, float]) -> dict[str, dict[str, figures.Series]]:
    """A panel with a line per level: R² against the mean of the teacher's levels, where their variances are known, else
    the squared error of the whitened levels."""
    errors = {name.removeprefix(MSE): line_of(metrics, name) for name in metrics[0] if name.startswith(MSE)}
    if not errors or not all(variances.get(level, 0) > 0 for level in errors):
        return {"squared error by level": errors}
    return {
        R2: {
            level: (steps, [1 - error / variances[level] for error in values])
            for level, (steps, values) in errors.items()
        }
    }


def line_of(metrics: Metrics, name: str) -> figures.Series:
    """Values of one name over the steps at which they were written."""
    known = [line for line in metrics if isinstance(line.get(name), int | float)]
    return [line["step"] for line in known], [line[name] for line in known]


def _panel(metrics: Metrics, names: Sequence[str]) -> dict[str, figures.Series]:
    return {name: line_of(metrics, name) for name in names if name in metrics[0]}


def _spent(metrics: Metrics) -> str:
    shares = {name.removeprefix("share/"): value for name, value in metrics[-1].items() if name.startswith("share/")}
    spent = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    return f"Where the time went at the end: {spent}." if spent else ""
