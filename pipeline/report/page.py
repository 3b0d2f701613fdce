"""`dtpipe report`: one self-contained HTML page about a run.

Everything on it is read from the run folder and the dataset; what cannot be had is left out, with a note that says why.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.downstream.result import headline_of
from dtpipe.distill.engine.record import read_record
from dtpipe.distill.engine.run_folder import read_config, read_metrics
from dtpipe.extract.config import ExtractConfig, TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.documents import Refusal
from dtpipe.manifests.errors import DamagedDataError, DtpipeError, InputError, StoreError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.records.document import read_document
from dtpipe.manifests.schema import Manifest, Plan, Recipe, ViewSpec
from dtpipe.manifests.store.outputs import refuse_other_file
from dtpipe.manifests.store.publish import write_whole
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Note, format_bytes
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report import figures
from dtpipe.pipeline.report.history import read_commands
from dtpipe.pipeline.report.inspect import view_name
from dtpipe.pipeline.report.maps import draw_maps, image_grid

if TYPE_CHECKING:
    from numpy.typing import NDArray


SAMPLE_COLUMNS = 8
_MARK = b"Written by dtpipe"  # at the foot of the page
LeaveOut = Callable[[str, DtpipeError], None]
"""Takes a part that the page goes without, and why."""


def write_report(config: ReportConfig, note: Note) -> Path:
    """Write the page and return where it is.

    Raises: InputError when `run` holds no run, TeacherError when `teacher` is none; StoreError when it cannot be
    written.
    """
    run = Path(config.run)
    out = Path(config.out) if config.out else run / "report.html"
    refuse_other_file(out, _MARK, "dtpipe report")
    context = build_context(run, config, note)
    try:
        write_whole(out, render(context))
    except OSError as err:
        raise StoreError(f"{out} cannot be written: {err}; choose another --out") from err
    return out


def render(context: Mapping[str, Any]) -> str:
    """The page; every value is escaped, figures come in as `Markup`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = (files("dtpipe.pipeline.report") / "templates" / "report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(**context)


def build_context(run: Path, config: ReportConfig, note: Note) -> dict[str, Any]:
    """All that the template shows."""
    settings = read_run_config(run)
    metrics = read_metrics(run)
    notes: list[str] = []

    def leave_out(what: str, err: DtpipeError) -> None:
        notes.append(f"{what} left out: {err}")
        note(notes[-1])

    datasets = _datasets(settings.datasets, leave_out) if settings.datasets else _live_data(run)
    return {
        "title": f"{settings.student.name}, distilled",
        "subtitle": f"{run} · {_origin(run, settings)}",
        "facts": _facts(settings, metrics),
        "scores": scores_of(run, leave_out),
        "curves": _curves(metrics),
        "curves_caption": _curves_caption(metrics),
        "maps": _maps(run, settings, config, leave_out),
        "samples": _samples(config),
        "commands": [
            *(dataset["command"] for dataset in datasets if dataset["command"]),
            *(record["command"] for record in read_commands(run)),
        ],
        "datasets": datasets,
        "config": yaml.safe_dump({"distill": settings.model_dump(mode="json")}, sort_keys=False),
        "notes": notes,
        "version": version("dtpipe"),
    }


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


def _facts(settings: DistillConfig, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    facts = {"student": settings.student.name, "epochs": str(settings.epochs), "global batch": str(settings.batch_size)}
    if metrics:
        last = metrics[-1]
        facts |= {
            "steps": f"{last['step']} of {last['num_steps']}",
            "loss": f"{last['loss']:.3f}",
            "images per second": f"{last['throughput_img_s']:.0f}",
        }
    return facts


def _curves(metrics: Sequence[Mapping[str, Any]]) -> Any:
    from markupsafe import Markup

    if not metrics:
        return None
    steps = [line["step"] for line in metrics]

    def panel(names: Sequence[str], strip: str = "") -> dict[str, figures.Series]:
        return {
            name.removeprefix(strip): (steps, [line[name] for line in metrics]) for name in names if name in metrics[0]
        }

    per_level = [name for name in metrics[0] if name.startswith("mse/")]
    losses = dict.fromkeys(
        name.partition("/")[0] for name in metrics[0] if "/" in name and not name.startswith("share/")
    )
    panels = {
        "loss": panel(["loss", *losses]),
        "squared error by level": panel(per_level, "mse/"),
        "learning rate": panel(["lr"]),
    }
    return Markup(figures.curves({title: lines for title, lines in panels.items() if lines}))


def _curves_caption(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    shares = {name.removeprefix("share/"): value for name, value in metrics[-1].items() if name.startswith("share/")}
    spent = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    return f"Where the time went at the end: {spent}." if spent else ""


def scores_of(run: Path, leave_out: LeaveOut) -> list[dict[str, Any]]:
    """One entry per file in the run's eval folder."""
    facts = []
    for path in sorted((run / "eval").glob("*.json")):
        try:
            facts.append(_score(path))
        except DtpipeError as err:
            leave_out("scores", err)
    return facts


def _score(path: Path) -> dict[str, Any]:
    """What a file of `dtpipe eval` says. Raises: DamagedDataError for another kind of file."""
    refusal = Refusal(DamagedDataError, "run `dtpipe eval` again")
    document = read_document(path, refusal.advice)
    try:
        return _table(document, path.stem)
    except (KeyError, TypeError, ValueError) as err:
        raise refusal.of(path, f"is no result of an evaluation ({type(err).__name__}: {err})") from err


def _table(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The scores of one evaluation, as the template shows them."""
    from markupsafe import Markup

    top = headline_of(document)
    numbers = sorted({summary.num_labelled for summary in top})
    cells: dict[str, dict[int, tuple[float, float]]] = {}
    for summary in top:
        cells.setdefault(summary.extractor, {})[summary.num_labelled] = (summary.mean, summary.std or 0.0)
    rows = {arm: [by_num.get(num) for num in numbers] for arm, by_num in cells.items()}
    seeds = max(summary.num_seeds for summary in top)
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    return {
        "title": f"{document['task']}: {document['metric']}",
        "numbers": [f"{num} labelled" for num in numbers],
        "rows": {arm: [_cell(cell, seeds) for cell in row] for arm, row in rows.items()},
        "caption": " ".join(
            [
                f"{count_of(document['num_test'], 'held-out image')}; {spread}.",
                *(f"{said}." for said in (document.get("headline"), document.get("verdict")) if said),
                *(f"{note}." for note in document["notes"]),
            ]
        ),
        "figure": Markup(figures.scores(name, numbers, rows, document["metric"])),
    }


def _cell(cell: tuple[float, float] | None, seeds: int) -> str:
    if cell is None:
        return "-"
    return f"{cell[0]:.3f} ± {cell[1]:.3f}" if seeds > 1 and cell[1] else f"{cell[0]:.3f}"


def _maps(run: Path, settings: DistillConfig, config: ReportConfig, leave_out: LeaveOut) -> Any:
    try:
        shown = draw_maps(run, settings, config.num_images, config.seed)
    except DtpipeError as err:
        leave_out("feature maps", err)
        return None
    images = [
        {
            "key": sample.key,
            "image": data_uri(sample.image),
            "pairs": [(data_uri(a), data_uri(b)) for a, b in sample.maps.values()],
        }
        for sample in shown.images
    ]
    return {"images": images, "errors": shown.errors}


def _samples(config: ReportConfig) -> Any:
    if config.teacher is None:
        return None

    teacher: Any = load_teacher(TeacherConfig(path=config.teacher), pick_device("auto"))
    if not hasattr(teacher, "sample"):
        return None
    images = np.asarray(teacher.sample(config.num_samples, config.seed, config.sample_steps))
    grid = image_grid(images, min(SAMPLE_COLUMNS, len(images)))
    drawn = f"{count_of(len(images), 'sample')}, {count_of(config.sample_steps, 'denoising step')}"
    caption = f"{drawn}, seed {config.seed}, not selected. What the teacher cannot draw it can hardly teach."
    return {"image": data_uri(grid), "width": max(grid.shape[1], min(1000, 2 * grid.shape[1])), "caption": caption}


def _datasets(urls: Sequence[str], leave_out: LeaveOut) -> list[dict[str, Any]]:
    shown = []
    for url in urls:
        try:
            dataset = FeatureDataset.open(url, allow_incomplete=True)
        except DtpipeError as err:
            leave_out(f"dataset {url}", err)
            continue
        provenance = dataset.plan.provenance
        shown.append(
            {
                "title": f"Dataset {url}",
                "settings": "settings of the extraction",
                "facts": _dataset_facts(dataset.plan, dataset.manifest),
                "command": provenance.get("command"),
                "config": yaml.safe_dump(
                    {"extract": ExtractConfig.in_halves(provenance.get("config") or {})}, sort_keys=False
                ),
            }
        )
    return shown


def _origin(run: Path, settings: DistillConfig) -> str:
    """Where the features came from, in a few words."""
    if settings.datasets:
        return f"features from {', '.join(settings.datasets)}"
    extract = read_config(run, "extract")
    images = extract.get("images") or f"{extract.get('num_samples')} images of its own in each epoch"
    return f"features of {extract.get('teacher', {}).get('path')}, encoded live over {images}; no dataset was stored"


def _live_data(run: Path) -> list[dict[str, Any]]:
    """What a run without a dataset was trained on, from its own records."""
    extract, record = read_config(run, "extract"), read_record(run) or {}
    live = record.get("live")
    if not live:
        return []
    transform, views = live["transform"], [ViewSpec.model_validate({**view, "draw": 0}) for view in live["views"]]
    facts = {
        "teacher": f"{live['teacher']['kind']}, weights {live['teacher']['weights_blake3'][:16]}",
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
    shown = {"title": title, "settings": "settings of images and teacher", "facts": facts, "command": None}
    return [{**shown, "config": yaml.safe_dump({"extract": extract}, sort_keys=False)}]


def _dataset_facts(plan: Plan, manifest: Manifest | None) -> dict[str, str]:
    recipe = plan.recipe
    views = [view_name(view) for view in recipe.views]
    facts = {
        "teacher": f"{recipe.teacher.kind}, weights {recipe.teacher.weights_blake3[:16]}",
        "images": images_fact(recipe),
        "levels": ", ".join(f"{level.name} ({level.channels}x{level.height}x{level.width})" for level in recipe.levels),
        "views": "; ".join(views),
    }
    if manifest is not None:
        totals = manifest.totals
        shards = count_of(totals.num_shards, "shard")
        facts["samples"] = f"{totals.num_ok} ok, {totals.num_bad} bad, in {shards}, {format_bytes(totals.size_bytes)}"
        facts["digest"] = manifest.digest
    return facts


def images_fact(recipe: Recipe) -> str:
    """Size of a dataset's images, and how they came to it."""
    how = "made by the teacher" if recipe.synthesized else recipe.transform.resize
    return f"{recipe.transform.width}x{recipe.transform.height} px, {how}"


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image as a PNG data URI. Shapes: (H, W, 3) uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
