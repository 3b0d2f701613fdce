"""How a run was made: commands, datasets and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.record import read_record
from dtpipe.distill.engine.run_folder import read_config
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.shards.advice import advice, share_text
from dtpipe.extract.shards.timeline import STALLS, Stalls
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.fidelity import CODEC_ERROR, FIT_EXPECTS
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import Manifest, Plan, Recipe, ViewSpec
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of, teacher_in_words
from dtpipe.pipeline.cli.console import format_bytes
from dtpipe.pipeline.report.history import read_commands
from dtpipe.pipeline.report.inspect import describe_levels, shard_table, stored_bytes, view_name
from dtpipe.pipeline.report.section import LeaveOut, Section, render


@dataclass(frozen=True)
class DataFacts:
    """What a run was trained on, in words."""

    title: str
    facts: dict[str, str]
    settings: str
    """What the settings below are of."""
    config: str
    command: str | None = None


def provenance_section(run: Path, settings: DistillConfig, leave_out: LeaveOut) -> Section:
    """Commands, datasets and settings behind a run."""
    datasets = _datasets(settings.datasets, leave_out) if settings.datasets else _live_data(run)
    commands = [dataset.command for dataset in datasets if dataset.command]
    try:
        commands += [record["command"] for record in read_commands(run)]
    except DtpipeError as err:
        leave_out("commands", err)
    config = yaml.safe_dump({"distill": settings.model_dump(mode="json")}, sort_keys=False)
    return Section("How it was made", render("provenance.html", commands=commands, datasets=datasets, config=config))


def datasets_section(urls: Sequence[str], leave_out: LeaveOut) -> Section:
    """Commands, facts and settings of datasets."""
    datasets = _datasets(urls, leave_out)
    commands = [dataset.command for dataset in datasets if dataset.command]
    return Section("How it was made", render("provenance.html", commands=commands, datasets=datasets, config=""))


def origin(run: Path, settings: DistillConfig) -> str:
    """Where the features came from, in a few words."""
    if settings.datasets:
        return f"features from {', '.join(settings.datasets)}"
    extract = read_config(run, "extract")
    images = extract.get("images") or f"{extract.get('num_samples')} images of its own in each epoch"
    return f"features of {extract.get('teacher', {}).get('path')}, encoded live over {images}; no dataset was stored"


def _datasets(urls: Sequence[str], leave_out: LeaveOut) -> list[DataFacts]:
    shown = []
    for url in urls:
        try:
            dataset = FeatureDataset.open(url, allow_incomplete=True)
        except DtpipeError as err:
            leave_out(f"dataset {url}", err)
            continue
        provenance = dataset.plan.provenance
        extract = {"extract": ExtractConfig.in_halves(provenance.get("config") or {})}
        shown.append(
            DataFacts(
                f"Dataset {url}",
                _dataset_facts(dataset.plan, dataset.manifest) | _bytes_facts(dataset),
                "settings of the extraction",
                yaml.safe_dump(extract, sort_keys=False),
                provenance.get("command"),
            )
        )
    return shown


def _live_data(run: Path) -> list[DataFacts]:
    """What a run without a dataset was trained on, from its own records."""
    extract, record = read_config(run, "extract"), read_record(run) or {}
    live = record.get("live")
    if not live:
        return []
    transform, views = live["transform"], [ViewSpec.model_validate({**view, "draw": 0}) for view in live["views"]]
    facts = {
        "teacher": teacher_in_words(live["teacher"]),
        "images": f"{transform['width']}x{transform['height']} px, {transform['resize']}",
        "levels": ", ".join(
            f"{level['name']} ({level['channels']}x{level['height']}x{level['width']})" for level in live["levels"]
        ),
        "views": "; ".join(view_name(view).replace("draw 0", "a new draw in each epoch") for view in views),
        "samples": f"{record['samples']['num']} in use, of {record['listing']['num']} listed",
    }
    title = (
        f"Images {extract['images']}, encoded live"
        if extract.get("images")
        else "Images that the teacher made while training"
    )
    config = yaml.safe_dump({"extract": extract}, sort_keys=False)
    return [DataFacts(title, facts, "settings of images and teacher", config)]


def _dataset_facts(plan: Plan, manifest: Manifest | None) -> dict[str, str]:
    recipe = plan.recipe
    views = [view_name(view) for view in recipe.views]
    facts = {
        "teacher": teacher_in_words(recipe.teacher.model_dump(mode="json")),
        "images": images_fact(recipe),
        "levels": ", ".join(f"{level.name} ({level.channels}x{level.height}x{level.width})" for level in recipe.levels),
        "views": "; ".join(views),
    }
    if manifest is not None:
        totals = manifest.totals
        shards = count_of(totals.num_shards, "shard")
        facts["samples"] = f"{totals.num_ok} ok, {totals.num_bad} bad, in {shards}, {format_bytes(totals.size_bytes)}"
        facts["digest"] = manifest.digest
        facts |= _measured_facts(plan, manifest)
    return facts


def _bytes_facts(dataset: FeatureDataset) -> dict[str, str]:
    """Bytes of levels beside those that a fit expected, where there was one."""
    if dataset.manifest is None or FIT_EXPECTS not in dataset.plan.provenance:
        return {}
    stored = stored_bytes(shard_table(Store(dataset.url), dataset))
    return {
        "bytes of levels": ", ".join(
            f"{level['name']} {format_bytes(level['size_bytes'])}"
            + (f" (expected {format_bytes(level['expected_bytes'])})" if level["expected_bytes"] is not None else "")
            for level in describe_levels(dataset, stored, dataset.manifest)
        )
    }


def _measured_facts(plan: Plan, manifest: Manifest) -> dict[str, str]:
    """What was measured while the dataset was written: what codecs lost, and where the time went."""
    facts = {}
    if lost := manifest.provenance.get(CODEC_ERROR):
        expected = plan.provenance.get(FIT_EXPECTS, {}).get("levels", {})
        facts["lost by codecs"] = ", ".join(
            f"{level} {100 * values['relative_mse']:.2g} % of the variance"
            + (f" (expected {100 * expected[level]['relative_mse']:.2g} %)" if level in expected else "")
            for level, values in lost.items()
        )
    stalls = sum(map(Stalls.from_record, manifest.provenance.get(STALLS, {}).values()), Stalls())
    if stalls.spans:
        facts["extraction's time"] = "; ".join(filter(None, (share_text(stalls.shares()), advice(stalls, plan.recipe))))
    return facts


def images_fact(recipe: Recipe) -> str:
    """Size of a dataset's images, and how they came to it."""
    how = "made by the teacher" if recipe.synthesized else recipe.transform.resize
    return f"{recipe.transform.width}x{recipe.transform.height} px, {how}"
