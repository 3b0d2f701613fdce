"""`dtpipe report FEATURES`: is this a dataset to train on? A verdict, and what it rests on, from a bounded sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.phases import phase
from dtpipe.manifests.words import count_of, teacher_in_words
from dtpipe.pipeline.cli.console import format_bytes
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report import figures
from dtpipe.pipeline.report.dataset.bad import shown_bad_samples
from dtpipe.pipeline.report.dataset.document import document_of, level_bytes
from dtpipe.pipeline.report.dataset.findings import DatasetFinding, findings_of, level_at, verdict_of
from dtpipe.pipeline.report.dataset.labels import LabelCounts
from dtpipe.pipeline.report.dataset.look import Looked, look_at
from dtpipe.pipeline.report.dataset.maps import dataset_maps
from dtpipe.pipeline.report.dataset.opened import OpenedDatasets, is_dataset
from dtpipe.pipeline.report.inspect import describe_dataset
from dtpipe.pipeline.report.provenance import datasets_section
from dtpipe.pipeline.report.section import Notes, Section, data_uri, render

_MOST_LABELS, _MOST_SHARDS = 24, 12
_PER_ROW = 3


def dataset_page_path(config: ReportConfig) -> Path:
    """Where the page goes by default: into the working directory, since nothing belongs into a dataset but it."""
    name = config.run[0].rstrip("/").rpartition("/")[2] or "dataset"
    return Path(config.out) if config.out else Path(f"{name}-report.html")


def dataset_page(config: ReportConfig, notes: Notes) -> tuple[str, str, dict[str, str], list[Section], dict[str, Any]]:
    """Title, subtitle, facts and sections of the page, and all figures as a document.

    Raises: what the readers raise; InputError without a good sample; ConfigError for datasets that do not fit.
    """
    with phase("opening the dataset"):
        opened = OpenedDatasets.open(config.run, config.join)
        descriptions = [describe_dataset(part.url) for part in opened.parts]
    looked = look_at(opened, config.samples, config.seed)
    columns = opened.source.columns
    num_bad = sum(status.startswith("bad") for status in columns.status)
    findings = findings_of(looked, opened.source.levels, num_bad, len(columns))
    stored = level_bytes(opened, descriptions)
    sections = [
        Section("Verdict", _verdict(findings, looked, len(columns.ok_rows))),
        *_labels_section(opened),
        Section("Levels", _levels_table(looked, stored)),
        *_relations_section(looked),
        *_drift_section(looked),
        *_soft_labels_section(opened, looked),
        *_maps(opened, looked, config, notes),
        *_bad_section(opened),
        datasets_section(config.run, notes.leave_out),
    ]
    document = document_of(opened, looked, findings, stored)
    title = " and ".join(config.run)
    return title, _subtitle(opened), _facts(opened, descriptions, looked), sections, document


def _subtitle(opened: OpenedDatasets) -> str:
    recipes = [part.recipe for part in opened.parts]
    return " · ".join(dict.fromkeys(teacher_in_words(recipe.teacher.model_dump(mode="json")) for recipe in recipes))


def _facts(opened: OpenedDatasets, descriptions: Sequence[Mapping[str, Any]], looked: Looked) -> dict[str, str]:
    columns = opened.source.columns
    complete = all(description["complete"] for description in descriptions)
    size = sum(description["totals"]["size_bytes"] for description in descriptions)
    return {
        "good samples": f"{len(columns.ok_rows):,} of {len(columns):,}",
        "looked at": f"{len(looked.rows):,}",
        "stored": format_bytes(size) + ("" if complete else ", unfinished"),
        "per sample": format_bytes(size / max(1, len(columns))),
        "levels": ", ".join(level.name for level in opened.source.levels),
        "views": str(len(opened.source.views)),
    }


def _verdict(findings: Sequence[DatasetFinding], looked: Looked, num_ok: int) -> Any:
    """The sentence on top, and what is behind it."""
    return render("verdict.html", headline=verdict_of(findings, looked, num_ok), findings=findings)


def _labels_section(opened: OpenedDatasets) -> Iterator[Section]:
    labels = LabelCounts.of(opened.source.columns.labels)
    if not labels.counts:
        return
    shown = dict(list(labels.counts.items())[:_MOST_LABELS])
    bars = figures.bars("labels", list(shown), {"samples": [float(num) for num in shown.values()]}, "samples")
    more = len(labels.counts) - len(shown)
    least, most = min(labels.counts.values()), max(labels.counts.values())
    caption = f"{count_of(len(labels.counts), 'label')}, {least} to {most} samples each"
    caption += f"; the {len(shown)} most frequent are shown" if more else ""
    caption += f"; {labels.num_without} samples have none" if labels.num_without else ""
    yield Section("Labels", render("figure.html", figures=[bars], caption=f"{caption}.", kind="bars"))


def _levels_table(looked: Looked, stored: Sequence[Mapping[str, Any]]) -> Any:
    several = len({timestep for _, timestep in looked.levels}) > 1
    of_level = {row["level"]: row for row in stored}
    rows = []
    for (name, timestep), of in looked.levels.items():
        own = of_level[name]
        rows.append(
            (
                level_at(name, timestep, several),
                f"{of.mean:.3g} ± {of.deviation:.3g}",
                f"{of.largest:.4g}",
                str(len(of.dead)),
                str(len(of.exploding)),
                f"{of.effective_rank:.1f} of {of.num_ranked}",
                _percent(None if of.image_share is None else min(1.0, of.image_share)),
                _percent(of.noise_share),
                _number(looked.of_pixels.get(name)),
                own["codec"],
                "-" if own["ratio"] is None else f"{own['ratio']:.2f}x",
                "-" if of.relative_error is None else f"{of.relative_error:.2g}",
            )
        )
    lines = {
        level_at(name, timestep, several): (list(range(1, len(of.strengths) + 1)), sorted(of.strengths, reverse=True))
        for (name, timestep), of in looked.levels.items()
    }
    curve = figures.curves(
        {"strength of channels": lines}, log=["strength of channels"], x_label="channels by strength"
    )
    return render("levels.html", rows=rows, figure=curve)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _relations_section(looked: Looked) -> Iterator[Section]:
    rows = [(source, target, _number(value)) for (source, target), value in looked.between.items()]
    if rows:
        yield Section("Levels from each other", render("between.html", rows=rows))


def _drift_section(looked: Looked) -> Iterator[Section]:
    if max(len(shards) for shards in looked.shards.values()) < 2:
        return
    panels = {
        "shift of the mean": {
            name: ([of.shard for of in shards], [of.shift for of in shards]) for name, shards in looked.shards.items()
        },
        "variance beside the median shard": {
            name: ([of.shard for of in shards], [of.scale for of in shards]) for name, shards in looked.shards.items()
        },
    }
    curves = figures.curves(panels, x_label="shard")
    other = [(name, of) for name, shards in looked.shards.items() for of in shards if of.differs][:_MOST_SHARDS]
    yield Section("Drift over shards", render("drift.html", figure=curves, rows=other))


def _soft_labels_section(opened: OpenedDatasets, looked: Looked) -> Iterator[Section]:
    for name, logits in looked.soft_labels.items():
        part, _ = opened.stored_as(name)[0]
        classes = part.recipe.teacher.options.get("classes") or list(map(str, range(logits.num_classes)))
        shares = dict(sorted(zip(classes, logits.class_shares.tolist(), strict=True), key=lambda one: -one[1]))
        shown = dict(list(shares.items())[:_MOST_LABELS])
        bars = figures.bars(
            f"classes of {name}", list(shown), {"share of cells": list(shown.values())}, "share of cells"
        )
        never = sum(share == 0 for share in shares.values())
        caption = f"Share of cells that each class is the likeliest of; mean entropy {logits.mean_entropy:.2f} nats."
        caption += f" {count_of(never, 'class', 'classes')} never the likeliest." if never else ""
        yield Section(f"Soft labels {name}", render("figure.html", figures=[bars], caption=caption, kind="bars"))


def _maps(opened: OpenedDatasets, looked: Looked, config: ReportConfig, notes: Notes) -> Iterator[Section]:
    try:
        yield dataset_maps(opened, looked.rows, config)
    except DtpipeError as err:
        notes.leave_out("segmentation maps", err)


def _bad_section(opened: OpenedDatasets) -> Iterator[Section]:
    shown = [sample for part in opened.parts for sample in shown_bad_samples(part)]
    if shown:
        rows = [(one.key, one.reason, None if one.thumbnail is None else data_uri(one.thumbnail)) for one in shown]
        num = sum(status.startswith("bad") for status in opened.source.columns.status)
        yield Section("Bad samples", render("bad.html", rows=rows, num=num))


def datasets_of(config: ReportConfig) -> bool:
    """True where the page is about datasets.

    Raises: ConfigError for runs and datasets on one page, or settings of the one beside the other.
    """
    of_data = [place for place in config.run if is_dataset(place)]
    runs = [place for place in config.run if place not in of_data]
    if runs and of_data:
        raise ConfigError(f"{runs[0]} is no feature dataset, and {of_data[0]} is; make a page of runs or of datasets")
    if of_data and config.teacher is not None:
        raise ConfigError("report.teacher draws samples for the page of a run; leave it out with a dataset")
    if runs and config.join:
        raise ConfigError(f"report.join is for feature datasets, and {runs[0]} is none; leave it out")
    return bool(of_data)
