"""`dtpipe predict`: images of any source through a predictor into files, one image at a time and never twice."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from blake3 import blake3

from dtpipe.distill.downstream.tuned.network import classes_to_dict
from dtpipe.distill.downstream.tuned.scoring import in_passes
from dtpipe.distill.engine.device import training_device
from dtpipe.distill.export.predictor import Predictor, load_predictor
from dtpipe.extract.config import SourceConfig
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.layouts.registry import open_layout, parse_layout
from dtpipe.extract.sources.places import file_stamp
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, ConfigError, ErrorBudgetError, InputError
from dtpipe.manifests.labels import Class, Instances, Pixels
from dtpipe.manifests.schema import TransformRecipe, height_width
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.paths import path_on_disk
from dtpipe.manifests.words import are, count_of
from dtpipe.pipeline.cli.console import Note, ProgressLine
from dtpipe.pipeline.config import PredictConfig
from dtpipe.pipeline.predict.collect import FILES_OF, write_tables
from dtpipe.pipeline.predict.folder import Done, PredictionFolder
from dtpipe.pipeline.predict.names import path_of_key
from dtpipe.pipeline.predict.overlay import draw_overlay

OVERLAYS = "overlays"
_READERS = 4  # threads that decode
_SHOWN_BAD = 5


@dataclass(frozen=True)
class ImageList:
    """Images by key, read when they are asked for."""

    keys: Sequence[str]
    read: Callable[[int], bytes]
    stamp: Callable[[int], str]
    """Of the file, as `file_stamp` gives it."""


@dataclass(frozen=True)
class _Decoded:
    """An image, and what tells it from a changed one."""

    pixels: Pixels
    digest: str
    stamp: str


@dataclass(frozen=True)
class Predictions:
    """What a run of the command left."""

    out: Path
    task: str
    num_images: int
    num_before: int
    """Done by an earlier run."""
    bad: Mapping[str, str]
    """Reason by key."""
    tables: tuple[Path, ...]


def predict(config: PredictConfig, note: Note) -> Predictions:
    """Predict what is not predicted yet of a source's images, and write the tables about all.

    Raises: InputError, ConfigError, DamagedDataError before anything is predicted; ErrorBudgetError naming images when
    too many are bad; StoppedError after a signal, with what is done kept; StoreError.
    """
    predictor = load_predictor(config.predictor, training_device(config.device))
    images = list_images(config.images)
    out = Path(config.out)
    _refuse_among_images(out, config.images)
    of = {
        "predictor": predictor.digest,
        "task": predictor.task.name,
        "classes": classes_to_dict(predictor.classes),
        "images": config.images,
        "px": None if config.px is None else list(height_width(config.px)),
        "resize": config.resize,
    }
    drawn = [OVERLAYS] if config.overlay else []
    min_score = _min_score(config, predictor)
    with PredictionFolder.open(out, of) as folder:
        _forget_changed(images, folder, note)
        todo = [row for row, key in enumerate(images.keys) if not folder.is_whole(key, drawn, min_score)]
        if len(todo) < len(images.keys):
            note(f"{len(images.keys) - len(todo)} of {count_of(len(images.keys), 'image')} done before")
        bad = _predict_rows(config, predictor, images, todo, folder)
        tables = write_tables(folder, images.keys, predictor.task.kind, predictor.classes)
    before = len(images.keys) - len(todo)
    return Predictions(out, predictor.task.name, len(images.keys), before, bad, tuple(tables))


def list_images(place: str) -> ImageList:
    """The images of a source or layout. Raises: InputError, ConfigError; InputError when a key occurs twice."""
    labelled = open_layout(place)
    if labelled is not None:
        items, read = labelled.items, labelled.read
    else:
        source = open_source(place)
        items = source.list()
        read = lambda row: source.read(items[row].uri)  # noqa: E731
    keys = [item.key for item in items]
    if len(set(keys)) < len(keys):
        twice = next(key for idx, key in enumerate(keys) if key in keys[:idx])
        raise InputError(f"{place}: key {twice} occurs twice; keys must be unique, so give the parts apart")
    return ImageList(keys, read, lambda row: file_stamp(items[row].uri))


def _min_score(config: PredictConfig, predictor: Predictor) -> float | None:
    """From which objects are drawn; None where none are."""
    return config.min_score if config.overlay and predictor.task.kind is Instances else None


def _forget_changed(images: ImageList, folder: PredictionFolder, note: Note) -> None:
    """Take away what was predicted of images that have changed under their keys since.

    A local file whose size and time are as they were is taken for the same; others are read.
    """
    doubtful = [
        row
        for row, key in enumerate(images.keys)
        if (done := folder.done.get(key)) is not None and not (done.stamp and done.stamp == images.stamp(row))
    ]

    def is_changed(row: int) -> bool:
        with suppress(BadImage):
            return blake3(images.read(row)).hexdigest() != folder.done[images.keys[row]].image
        return True

    with ThreadPoolExecutor(_READERS) as pool, ProgressLine("compare") as progress:
        changed = []
        for num, (row, differs) in enumerate(zip(doubtful, pool.map(is_changed, doubtful), strict=True), 1):
            progress.update(num, len(doubtful), "images done before are compared with what they were")
            changed += [images.keys[row]] if differs else []
    for key in changed:
        folder.forget(key)
    if changed:
        note(
            f"{count_of(len(changed), 'image')} changed since, {changed[0]} for one, and {are(len(changed))} done again"
        )


def _predict_rows(
    config: PredictConfig, predictor: Predictor, images: ImageList, todo: Sequence[int], folder: PredictionFolder
) -> dict[str, str]:
    """Reasons of bad images by key."""
    bad: dict[str, str] = {}
    num_allowed, started, num_read = config.max_bad_samples(len(images.keys)), time.monotonic(), 0
    reading = closing(_decoded(config, images, todo))
    with StopRequest() as stop, ProgressLine("predict") as progress, reading as decoded:
        for part in in_passes(decoded, config.batch_size, lambda entry: _num_px(entry[1])):
            good = {images.keys[row]: image for row, image in part if not isinstance(image, BadImage)}
            bad |= {images.keys[row]: err.reason for row, err in part if isinstance(err, BadImage)}
            _predict_batch(config, predictor, good, folder)
            num_read += len(part)
            rate = num_read / (time.monotonic() - started)
            progress.update(num_read, len(todo), f"{rate:.1f} img/s, {len(bad)} bad")
            if len(bad) > num_allowed:
                raise ErrorBudgetError(_too_many(config, bad, num_allowed))
            stop.raise_if_requested(f"{num_read} of {count_of(len(todo), 'image')}", "predictions are kept")
    return bad


def _num_px(image: _Decoded | BadImage) -> int:
    return 0 if isinstance(image, BadImage) else image.pixels.size // 3


def _predict_batch(
    config: PredictConfig, predictor: Predictor, images: Mapping[str, _Decoded], folder: PredictionFolder
) -> None:
    if not images:
        return
    predictions = predictor.predict([image.pixels for image in images.values()])
    min_score = _min_score(config, predictor)
    for (key, image), prediction in zip(images.items(), predictions, strict=True):
        files, said = _files_of(key, prediction, predictor)
        if config.overlay:
            overlay = draw_overlay(image.pixels, prediction, predictor.classes, config.min_score)
            files[f"{OVERLAYS}/{path_of_key(key, '.png')}"] = overlay
        height, width = image.pixels.shape[:2]
        folder.add(key, Done((height, width), {}, said, image.digest, image.stamp, min_score), files)


def _files_of(key: str, prediction: Any, predictor: Predictor) -> tuple[dict[str, bytes], Any]:
    """What the task saves of an image, by path; of a class, which goes into a table alone, the values."""
    saved = dict(predictor.task.save(prediction, predictor.classes))
    if predictor.task.kind is Class:
        return {}, json.loads(saved[".json"])
    places = FILES_OF[predictor.task.kind]
    return {f"{places[ending]}/{path_of_key(key, ending)}": content for ending, content in saved.items()}, None


def _decoded(
    config: PredictConfig, images: ImageList, rows: Sequence[int]
) -> Generator[tuple[int, _Decoded | BadImage], None, None]:
    """Rows with their pixels, or what is wrong with them, in order; the next ones are read meanwhile."""
    left, ahead = iter(rows), deque[tuple[int, Future[_Decoded | BadImage]]]()
    pool = ThreadPoolExecutor(_READERS)
    try:
        while True:
            for row in islice(left, 2 * config.batch_size - len(ahead)):
                ahead.append((row, pool.submit(_read, config, images, row)))
            if not ahead:
                return
            row, future = ahead.popleft()
            yield row, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(config: PredictConfig, images: ImageList, row: int) -> _Decoded | BadImage:
    try:
        stamp, data = images.stamp(row), images.read(row)
        pixels = decode_image(data, SourceConfig().max_pixels)
        if config.px is not None:
            height, width = height_width(config.px)
            pixels = resize_image(pixels, TransformRecipe(resize=config.resize, height=height, width=width))
        return _Decoded(pixels, blake3(data).hexdigest(), stamp)
    except BadImage as err:
        return err


def _too_many(config: PredictConfig, bad: Mapping[str, str], num_allowed: int) -> str:
    named = "; ".join(f"{key}: {reason}" for key, reason in list(bad.items())[:_SHOWN_BAD])
    more = f"; and {len(bad) - _SHOWN_BAD} more" if len(bad) > _SHOWN_BAD else ""
    return (
        f"{config.images} has {count_of(len(bad), 'bad image')}, predict.max_bad allows {num_allowed} ({named}{more}); "
        "mend the images, or run again with a larger --max-bad; what is predicted is kept"
    )


def _refuse_among_images(out: Path, images: str) -> None:
    """Raises: ConfigError for an output that would be read as images the next time."""
    parsed = parse_layout(images)
    source = path_on_disk(parsed[1] if parsed else images)
    if source is not None and out.absolute().is_relative_to(source):
        raise ConfigError(f"--out {out} lies among the images of {source}; name another folder")
