"""Held-out images with their labels and what each arm said of them, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.registry import find_task
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.examples import fit_targets
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction, Detections
from dtpipe.manifests.errors import DtpipeError, InputError
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Pixels
from dtpipe.manifests.schema import TransformRecipe, height_width
from dtpipe.pipeline.cli.console import say_nothing
from dtpipe.pipeline.config import EvalConfig, ReportConfig
from dtpipe.pipeline.predict.overlay import Entry, painted
from dtpipe.pipeline.report.section import Notes, data_uri, render
from dtpipe.pipeline.report.tasks.predictions import KeptPredictions, Said, as_said
from dtpipe.pipeline.report.tasks.results import TaskResult
from dtpipe.pipeline.sets import open_sets

_MOST_PX = 320
_MIN_SCORE, _SUREST = 0.3, 3
"""Of the objects that are drawn; so many of an image where none is as sure."""
_NOBODY_KNOWS = (128, 128, 128)  # pixels without a label
_LIKELIEST = 3
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ShownCell:
    """A picture, or for classes a few lines of text; `right` where the text is the truth's."""

    picture: str | None = None
    lines: Sequence[str] = ()
    right: bool | None = None


def prediction_pictures(result: TaskResult, config: ReportConfig, notes: Notes) -> Markup:
    """A few held-out images, drawn by the seed; nothing for a task that keeps no predictions.

    What cannot be read is left out with a note.
    """
    if not result.folders:
        return Markup()
    try:
        kept = {arm: KeptPredictions.open(folder) for arm, folder in result.folders.items()}
        columns = {arm: predictions for arm, predictions in kept.items() if predictions is not None}
        if not columns:
            raise InputError(f"no predictions are kept in {result.path.with_suffix('')}")
        return _gallery(result, _held_out(result, next(iter(columns.values()))), columns, config)
    except DtpipeError as err:
        notes.leave_out(f"pictures of {result.task}", err)
        return Markup()


def _held_out(result: TaskResult, kept: KeptPredictions) -> LabelledSet:
    """The images that a result was scored on, opened again; frozen features took them at the size of their masks.

    Raises: InputError, ConfigError where they are gone; DamagedDataError.
    """
    try:
        config = EvalConfig.model_validate(result.document.get("config"))
    except ValidationError as err:
        raise InputError(f"{result.path} does not say on which images it was scored: {err.errors()[0]['msg']}") from err
    task = find_task(result.task)
    tuned = isinstance(task, TunedTask)
    whole = tuned or task.target is Class
    size = height_width(config.px) if config.px else None if whole else kept.mask_px()
    recipe = TransformRecipe(resize=config.resize, height=size[0], width=size[1]) if size else None
    test = open_sets(config, recipe, say_nothing, as_masks=not tuned)[1]
    return fit_targets(task, test) if isinstance(task, TunedTask) else test


def _gallery(
    result: TaskResult, test: LabelledSet, columns: Mapping[str, KeptPredictions], config: ReportConfig
) -> Markup:
    common = [row for row, key in enumerate(test.keys) if all(key in kept.rows for kept in columns.values())]
    if not common:
        raise InputError(f"none of the images that {result.path} was scored on is there any more")
    generator = np.random.Generator(np.random.Philox(config.seed))
    rows = np.sort(generator.choice(common, size=min(config.num_images, len(common)), replace=False))
    legend: dict[str, Colour] = {}
    images = []
    for row in rows.tolist():
        image = test.image(row)
        cells = list(_cells(test, row, image, columns, legend))
        images.append((test.keys[row], data_uri(_small(image)), cells))
    return render(
        "gallery.html",
        arms=["labels", *columns],
        images=images,
        legend=_in_order(legend, test.classes.names),
        caption=_caption(result, test),
    )


def _in_order(legend: Mapping[str, Colour], names: Sequence[str]) -> dict[str, Colour]:
    """By class number; what is no class, last."""
    places = {name: place for place, name in enumerate(names)}
    return {name: legend[name] for name in sorted(legend, key=lambda name: places.get(name, len(names)))}


def _cells(
    test: LabelledSet,
    row: int,
    image: Pixels,
    columns: Mapping[str, KeptPredictions],
    legend: dict[str, Colour],
) -> Iterator[ShownCell]:
    """The truth, then each arm; colours that stand for classes go into the legend."""
    target, size_px = test.target(row), (image.shape[0], image.shape[1])
    truth = as_said(target, test.classes)
    unknown = ~target.known if isinstance(target, Mask) else None
    for said in [truth, *(kept.read(test.keys[row], size_px, test.kind, test.classes) for kept in columns.values())]:
        if isinstance(said, ClassPrediction):
            yield _named(said, truth, test.classes.names)
            continue
        if isinstance(said, Detections):
            picture, entries = _with_objects(_small(image), said, test.classes, said is not truth)
        else:
            picture, entries = _painted(image, said, test, unknown if said is truth else None)
        legend.update(entries)
        yield ShownCell(data_uri(_small(picture)))


def _named(said: ClassPrediction, truth: Said, names: Sequence[str]) -> ShownCell:
    assert isinstance(truth, ClassPrediction)
    order = said.probabilities.argsort()[::-1][:_LIKELIEST]
    if said is truth:
        return ShownCell(lines=[names[order[0]]])
    lines = [f"{names[number]} {said.probabilities[number]:.2f}" for number in order if said.probabilities[number] > 0]
    return ShownCell(lines=lines, right=bool(order[0] == truth.probabilities.argmax()))


def _with_objects(
    image: Pixels, said: Detections, classes: ClassTable, with_scores: bool
) -> tuple[Pixels, list[Entry]]:
    """Objects on an image of the size at which it is shown, whose names can be read there, and the colours of classes.

    Where none is sure, the surest are drawn.
    """
    sure = said.scores.max(initial=0) >= _MIN_SCORE
    least = _MIN_SCORE if sure else float(said.scores[:_SUREST].min(initial=1))
    picture, (_counted, *entries) = painted(image, _fitted(said, image.shape[:2]), classes, least, with_scores)
    return np.array(picture), entries


def _fitted(said: Detections, size_px: tuple[int, ...]) -> Detections:
    """Objects on their image at another size, masks by nearest neighbour."""
    (height, width), (own_height, own_width) = size_px, said.size_px
    boxes = said.boxes * np.array([width / own_width, height / own_height] * 2, np.float32)
    rows, columns = np.arange(height) * own_height // height, np.arange(width) * own_width // width
    masks = None if said.masks is None else said.masks[:, rows][:, :, columns]
    return replace(said, size_px=(height, width), boxes=boxes, masks=masks)


def _painted(
    image: Pixels, said: Said, test: LabelledSet, unknown: NDArray[np.bool_] | None
) -> tuple[Pixels, list[Entry]]:
    picture, entries = painted(image, said, test.classes, _MIN_SCORE)
    pixels = np.array(picture)
    if unknown is not None and unknown.any():
        scale = pixels.shape[0] // image.shape[0]
        pixels[unknown.repeat(scale, axis=0).repeat(scale, axis=1)] = _NOBODY_KNOWS
        entries = [*entries, ("no label", _NOBODY_KNOWS)]
    return pixels, entries


def _small(image: Pixels) -> Pixels:
    """At most `_MOST_PX` on its longer side."""
    scale = _MOST_PX / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _caption(result: TaskResult, test: LabelledSet) -> str:
    """Which networks said it, of which images."""
    num = max(result.numbers)
    whose = f"classifiers on frozen features, from {num}" if result.frozen else f"networks trained on {num}"
    said = (
        f"Held-out images, drawn by the seed, not selected; {whose} labelled, "
        "by the first seed whose predictions are here."
    )
    drawn = f"Objects of score {_MIN_SCORE} and above, and the {_SUREST} surest of an image where none reaches it."
    return f"{said} {drawn}" if test.kind is Instances else said
