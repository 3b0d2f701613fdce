"""`dtpipe report A B C`: several runs on one page. What differs in their settings, curves and scores together, maps of
the same images side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtpipe.distill.config import DistillConfig
from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report import figures
from dtpipe.pipeline.report.maps.columns import column_sections
from dtpipe.pipeline.report.provenance import provenance_section
from dtpipe.pipeline.report.section import Notes, Section, render
from dtpipe.pipeline.report.tasks.merged import merged_sections
from dtpipe.pipeline.report.training import (
    BY_LEVEL,
    R2_MEANS,
    R2_TITLE,
    Metrics,
    facts_of,
    level_lines,
    line_of,
    loss_names,
    read_run_config,
    run_metrics,
)

_PER_ROW = 3  # panels of curves


@dataclass(frozen=True)
class NamedRun:
    """A run under the name that it has on the page."""

    name: str
    path: Path
    settings: DistillConfig
    metrics: Metrics


def compared_sections(paths: Sequence[str], config: ReportConfig, notes: Notes) -> tuple[str, list[Section]]:
    """The page's title and its parts. Raises: InputError where one is no run; ConfigError where one stands twice."""
    names = run_names(paths)
    runs = [_named_run(name, Path(path), notes) for name, path in zip(names, paths, strict=True)]
    sections = [
        _settings_section(runs),
        *merged_sections({run.name: run.path for run in runs}, config, notes),
        *_curves_section(runs),
        *column_sections({run.name: (run.path, run.settings) for run in runs}, config, notes),
    ]
    for run in runs:
        made = provenance_section(run.path, run.settings, notes.leave_out)
        sections.append(Section(f"How {run.name} was made", made.html))
    return ", ".join(names), sections


def _named_run(name: str, path: Path, notes: Notes) -> NamedRun:
    return NamedRun(name, path, read_run_config(path), run_metrics(path, notes.leave_out))


def run_names(paths: Sequence[str]) -> list[str]:
    """As few of the last parts of each path as tell them apart. Raises: ConfigError naming a path that stands twice."""
    whole = [Path(path).absolute().parts for path in paths]
    for idx, parts in enumerate(whole):
        if parts in whole[:idx]:
            raise ConfigError(f"{paths[idx]} is given twice; name each run once")
    for num in range(1, max(map(len, whole))):
        names = ["/".join(parts[-num:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _settings_section(runs: Sequence[NamedRun]) -> Section:
    """Settings of the recipe that are not equal, and where each run has come to."""
    facts = [facts_of(run.settings, run.metrics) for run in runs]
    shown = [name for name in ("steps", "loss") if any(name in of for of in facts)]
    rows = {name: [of.get(name, "-") for of in facts] for name in shown}
    settings = differing([run.settings.model_dump(mode="json") for run in runs])
    return Section("Settings", render("settings.html", names=[run.name for run in runs], rows=rows, settings=settings))


def differing(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Dotted keys whose values differ, with the value of each document; `run.` says only how a run is carried out."""
    flat = [dict(_flattened(document)) for document in documents]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if not key.startswith("run.")]
    rows = {key: [_text(values.get(key, "-")) for values in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _flattened(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)


def _curves_section(runs: Sequence[NamedRun]) -> Iterator[Section]:
    """A panel for each loss and level, with a line per run; nothing where no run has metrics."""
    trained = [run for run in runs if run.metrics]
    if not trained:
        return
    names = dict.fromkeys(name for run in trained for name in loss_names(run.metrics))
    panels = {
        name: {run.name: line_of(run.metrics, name) for run in trained if name in run.metrics[0]} for name in names
    }
    for run in trained:
        for title, lines in level_lines(run.metrics).items():
            for level, line in lines.items():
                panels.setdefault(f"{title.removesuffix(BY_LEVEL)} of {level}", {})[run.name] = line
    titles = list(panels)
    of_r2 = [title for title in titles if title.startswith(R2_TITLE.removesuffix(BY_LEVEL))]
    rows = [
        figures.curves(
            {title: panels[title] for title in titles[start : start + _PER_ROW]}, num_columns=_PER_ROW, against=of_r2
        )
        for start in range(0, len(titles), _PER_ROW)
    ]
    caption = R2_MEANS if of_r2 else ""
    yield Section("Training", render("training.html", figures=rows, caption=caption))
