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
BY_LEVEL = " by level"
R2_TITLE, ERROR_TITLE = f"R²{BY_LEVEL}", f"squared error{BY_LEVEL}"
_RATE, _SPEED, _SHARES = "learning rate", "images per second", "shares of the time"
_PER_ROW = 3
_LEAST_SHARE = 0.01
R2_MEANS = (
    "R² of the regressor's output: 1 is the teacher's whitened level; 0, the dashed line, a constant: the dataset's "
    "mean of each channel."
)


def read_run_config(run: Path) -> DistillConfig:
    """The resolved settings of a run folder. Raises: InputError when there is none."""
    from pydantic import ValidationError

    if not (run / "config.yaml").is_file():
        raise InputError(
            f"{run}: no run of `dtpipe distill` is here (no config.yaml), and no feature dataset; "
            "give the --out folder of either"
        )
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


def training_section(metrics: Metrics) -> Iterator[Section]:
    """Curves; nothing where there are none."""
    if not metrics:
        return
    panels = {"loss": _panel(metrics, loss_names(metrics)), **level_lines(metrics), **term_lines(metrics)}
    shown = {title: lines for title, lines in panels.items() if lines}
    course = {_RATE: _panel(metrics, ["lr"]), _SPEED: _panel(metrics, ["throughput_img_s"]), _SHARES: _shares(metrics)}
    drawn = [
        figures.curves(shown, against=[R2_TITLE], num_columns=max(_PER_ROW, len(shown))),
        figures.curves({title: lines for title, lines in course.items() if lines}, num_columns=_PER_ROW),
    ]
    said = f"{R2_MEANS if R2_TITLE in panels else ''} {_rate(metrics)} {_spent(metrics)}"
    yield Section("Training", render("training.html", figures=drawn, caption=" ".join(said.split())))


def loss_names(metrics: Metrics) -> list[str]:
    """`loss`, which is minimised, and its terms."""
    parts = dict.fromkeys(
        name.partition("/")[0] for name in metrics[0] if "/" in name and not name.startswith("share/")
    )
    return [name for name in ["loss", *parts] if name in metrics[0]]


def level_lines(metrics: Metrics) -> dict[str, dict[str, figures.Series]]:
    """A panel with a line per level: R², or the squared errors of a run that was written before there was R²."""
    for title, prefix in ((R2_TITLE, "r2/"), (ERROR_TITLE, "mse/")):
        names = dict.fromkeys(name for line in metrics for name in line if name.startswith(prefix))
        if names:
            return {title: {name.removeprefix(prefix): line_of(metrics, name) for name in names}}
    return {}


def line_of(metrics: Metrics, name: str) -> figures.Series:
    """Values of one name over the steps at which they were written."""
    known = [line for line in metrics if isinstance(line.get(name), int | float)]
    return [line["step"] for line in known], [line[name] for line in known]


def term_lines(metrics: Metrics) -> dict[str, dict[str, figures.Series]]:
    """A panel for each term of the loss that is known by level, with a line per level."""
    names = dict.fromkeys(name for line in metrics for name in line if "/" in name)
    terms = dict.fromkeys(name.partition("/")[0] for name in names)
    drawn = {name.partition("/")[0] for name in names if name.startswith(("r2/", "share/"))}
    if not any(name.startswith("r2/") for name in names):
        drawn.add("mse")  # it stands in place of R²
    return {
        f"{term}{BY_LEVEL}": {
            name.partition("/")[2]: line_of(metrics, name) for name in names if name.startswith(f"{term}/")
        }
        for term in terms
        if term not in drawn
    }


def _shares(metrics: Metrics) -> dict[str, figures.Series]:
    """Share of the time of each activity, over the steps; what never takes a hundredth is left out."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith("share/"))
    lines = {name.removeprefix("share/"): line_of(metrics, name) for name in names}
    return {name: line for name, line in lines.items() if max(line[1]) >= _LEAST_SHARE}


def _rate(metrics: Metrics) -> str:
    """Where the learning rate was highest."""
    if "lr" not in metrics[0]:
        return ""
    top = max(metrics, key=lambda line: float(line["lr"]))
    return f"The learning rate rose to {top['lr']:.3g} at step {top['step']} and ended at {metrics[-1]['lr']:.2g}."


def _panel(metrics: Metrics, names: Sequence[str]) -> dict[str, figures.Series]:
    return {name: line_of(metrics, name) for name in names if name in metrics[0]}


def _spent(metrics: Metrics) -> str:
    shares = {name.removeprefix("share/"): value for name, value in metrics[-1].items() if name.startswith("share/")}
    spent = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    return f"Where the time went at the end: {spent}." if spent else ""
