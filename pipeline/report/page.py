"""`dtpipe report`: one self-contained HTML page about a run, or about several.

Everything on it is read from the run folder and the dataset; what cannot be had is left out, with a note that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.store.outputs import refuse_other_file
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report.comparison import compared_sections
from dtpipe.pipeline.report.dataset.page import dataset_page, dataset_page_path
from dtpipe.pipeline.report.interpreter import interpreter_sections
from dtpipe.pipeline.report.maps.sections import map_sections
from dtpipe.pipeline.report.provenance import origin, provenance_section
from dtpipe.pipeline.report.section import Notes, Section, render
from dtpipe.pipeline.report.summary import context_of, summary_section
from dtpipe.pipeline.report.tasks.section import task_sections
from dtpipe.pipeline.report.training import facts_of, read_run_config, run_metrics, training_section

_MARK = b"Written by dtpipe"  # at the foot of the page


def write_report(config: ReportConfig, note: Note) -> Path:
    """Write the page about a run, or about several beside each other, and return where it is.

    Raises: InputError when `run` holds no run, TeacherError when `teacher` is none; ConfigError for a run that is given
    twice; StoreError when it cannot be written.
    """
    first = Path(config.run[0])
    out = Path(config.out) if config.out else first / ("report.html" if len(config.run) == 1 else "comparison.html")
    refuse_other_file(out, _MARK, "dtpipe report")
    html = run_page(first, config, note) if len(config.run) == 1 else comparison_page(config, note)
    return _write(out, html)


def write_dataset_report(config: ReportConfig, note: Note) -> tuple[Path, dict[str, Any]]:
    """Write the page about datasets; returns where it is, and its figures as a document.

    Raises: what readers of a dataset raise; InputError without a good sample; ConfigError for datasets that do not fit;
    StoreError when it cannot be written.
    """
    out, notes = dataset_page_path(config), Notes(note)
    refuse_other_file(out, _MARK, "dtpipe report")
    title, subtitle, facts, sections, document = dataset_page(config, notes)
    return _write(out, whole_page(title, subtitle, facts, sections, notes.sentences)), document


def _write(out: Path, html: str) -> Path:
    try:
        write_whole(out, html)
    except OSError as err:
        raise StoreError(f"{out} cannot be written: {err}; choose another --out") from err
    return out


def comparison_page(config: ReportConfig, note: Note) -> str:
    """The page about several runs."""
    notes = Notes(note)
    title, sections = compared_sections(config.run, config, notes)
    subtitle = " · ".join(config.run)
    return whole_page(title, subtitle, {}, sections, notes.sentences)


def run_page(run: Path, config: ReportConfig, note: Note) -> str:
    """The page about one run."""
    settings, notes = read_run_config(run), Notes(note)
    metrics = run_metrics(run, notes.leave_out)
    sections = [
        *summary_section(run),
        *task_sections(run, config, notes),
        *training_section(metrics),
        *map_sections(run, settings, config, notes),
        *interpreter_sections(settings, config.num_images, notes.leave_out),
        provenance_section(run, settings, notes.leave_out),
    ]
    facts = facts_of(settings, metrics) | context_of(run, settings, metrics)
    return whole_page(
        f"{settings.student.name}, distilled", f"{run} · {origin(run, settings)}", facts, sections, notes.sentences
    )


def whole_page(
    title: str, subtitle: str, facts: Mapping[str, str], sections: Sequence[Section], notes: Sequence[str]
) -> str:
    """HTML of a page; every value is escaped."""
    page = {"title": title, "subtitle": subtitle, "facts": facts, "sections": sections, "notes": notes}
    return str(render("report.html", **page, version=version("dtpipe")))
