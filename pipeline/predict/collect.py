"""What is said of all images together, made of what lies in the folder: a CSV of classes, COCO's results, panoptic.

Written again by each run, from every image that is done.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dtpipe.manifests.documents import Refusal, parse_json
from dtpipe.manifests.errors import DamagedDataError, StoreError
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Panoptic, Target
from dtpipe.manifests.store.publish import whole_file
from dtpipe.pipeline.predict.folder import Done, PredictionFolder

OBJECTS, PANOPTIC = "objects", "panoptic"
FILES_OF: dict[type[Target], dict[str, str]] = {  # kind of target: folder of each ending that its task saves
    Class: {},
    Mask: {".png": "masks"},
    Instances: {".json": OBJECTS},
    Panoptic: {".png": PANOPTIC, ".json": "segments"},
}


def write_tables(folder: PredictionFolder, keys: Sequence[str], kind: type[Target], classes: ClassTable) -> list[Path]:
    """Files about all images that are done, in the order of `keys`. Raises: StoreError; DamagedDataError."""
    done = [(number, key) for number, key in zip(image_ids(keys), keys, strict=True) if key in folder.done]
    if kind is Class:
        return [_write(folder.path / "classes.csv", _class_rows(folder, [key for _, key in done]))]
    if kind is Instances:
        images = {"images": _images(folder, done), "categories": _categories(classes), "annotations": []}
        results = (entry for number, key in done for entry in _objects(folder, number, key))
        return [
            _write(folder.path / "results.json", _listed(results)),
            _write(folder.path / "images.json", [json.dumps(images, ensure_ascii=False)]),
        ]
    if kind is Panoptic:
        return [_write(folder.path / "panoptic.json", _panoptic(folder, done, classes))]
    return []


def image_ids(keys: Sequence[str]) -> list[int]:
    """COCO's numbers of images: those in their file names, where each has one of its own, else their places from 1."""
    stems = [PurePosixPath(key).stem for key in keys]
    numbers = [int(stem) for stem in stems if re.fullmatch(r"[0-9]{1,18}", stem)]
    return numbers if len(set(numbers)) == len(keys) else list(range(1, len(keys) + 1))


def _class_rows(folder: PredictionFolder, keys: Iterable[str]) -> Iterator[str]:
    """key, likeliest class, its probability."""
    yield _csv_line(("key", "class", "probability"))
    for key in keys:
        name, probability = next(iter(folder.done[key].said["classes"].items()))
        yield _csv_line((key, name, probability))


def _csv_line(values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _images(folder: PredictionFolder, done: Iterable[tuple[int, str]]) -> list[dict[str, Any]]:
    return [
        {"id": number, "file_name": key, "height": folder.done[key].px[0], "width": folder.done[key].px[1]}
        for number, key in done
    ]


def _categories(classes: ClassTable) -> list[dict[str, Any]]:
    """Under the data set's own numbers."""
    return [
        {"id": classes.numbers.get(number, number), "name": name, "isthing": int(number in classes.things)}
        if classes.things
        else {"id": classes.numbers.get(number, number), "name": name}
        for number, name in enumerate(classes.names)
    ]


def _objects(folder: PredictionFolder, number: int, key: str) -> Iterator[dict[str, Any]]:
    for entry in _said(folder, folder.done[key]):
        yield {"image_id": number, **entry}


def _panoptic(folder: PredictionFolder, done: Sequence[tuple[int, str]], classes: ClassTable) -> Iterator[str]:
    """COCO's panoptic format: segments of each PNG below `panoptic/`."""
    images, categories = _images(folder, done), _categories(classes)
    yield json.dumps({"images": images, "categories": categories}, ensure_ascii=False)[:-1] + ', "annotations": '
    yield from _listed(_annotation(folder, number, key) for number, key in done)
    yield "}"


def _annotation(folder: PredictionFolder, number: int, key: str) -> dict[str, Any]:
    done = folder.done[key]
    (png,) = (name for name in done.files if name.startswith(f"{PANOPTIC}/"))
    segments = _said(folder, done)
    return {"image_id": number, "file_name": png.removeprefix(f"{PANOPTIC}/"), "segments_info": segments}


def _said(folder: PredictionFolder, done: Done) -> Any:
    """The JSON of one image."""
    (name,) = (name for name in done.files if name.endswith(".json"))
    refusal = Refusal(DamagedDataError, "remove it and run again")
    try:
        text = (folder.path / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise refusal.of(folder.path / name, f"cannot be read ({err})") from err
    return parse_json(text, folder.path / name, refusal)


def _listed(values: Iterable[object]) -> Iterator[str]:
    """A JSON list, written one value at a time."""
    yield "["
    for idx, value in enumerate(values):
        yield f"{',' if idx else ''}\n{json.dumps(value, ensure_ascii=False)}"
    yield "\n]\n"


def _write(path: Path, pieces: Iterable[str]) -> Path:
    try:
        with whole_file(path) as written, written.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; make room and run again") from err
    return path
