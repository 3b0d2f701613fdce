"""What networks and classifiers said of held-out images, read from the folders where their scoring kept it.

The files are those of the tasks' `save`; here they become the same records again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray
from PIL import Image

from dtpipe.distill.downstream.kept import KEYS_FILE, PREDICTED
from dtpipe.distill.downstream.tuned.predictions import (
    ClassPrediction,
    Detections,
    MaskPrediction,
    PanopticPrediction,
)
from dtpipe.manifests.documents import Refusal
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.labels import Class, ClassTable, Instances, Mask, Panoptic, Target
from dtpipe.manifests.records.document import read_document

Said = ClassPrediction | MaskPrediction | Detections | PanopticPrediction
_WRONG = (OSError, KeyError, TypeError, ValueError, AttributeError, SyntaxError)  # what readers raise
_REFUSAL = Refusal(DamagedDataError, "run `dtpipe eval` again")


@dataclass(frozen=True)
class KeptPredictions:
    """The predictions of one training."""

    folder: Path
    rows: Mapping[str, int]
    """Key of a held-out image to the number in the names of its files."""

    @classmethod
    def open(cls, training: Path) -> KeptPredictions | None:
        """Those in the folder of a training; None where none are kept. Raises: DamagedDataError."""
        folder = training / PREDICTED
        if not (folder / KEYS_FILE).exists():
            return None
        keys = read_document(folder / KEYS_FILE, _REFUSAL.advice).get("keys")
        if not isinstance(keys, list):
            raise _REFUSAL.of(folder / KEYS_FILE, "does not say whose the predictions are")
        return cls(folder, {str(key): row for row, key in enumerate(keys)})

    def mask_px(self) -> tuple[int, int]:
        """Height and width of the masks, which are all of one size. Raises: DamagedDataError."""
        path = self.folder / "00000.png"
        try:
            with Image.open(path) as mask:
                return mask.height, mask.width
        except (*_WRONG, Image.DecompressionBombError) as err:
            raise _REFUSAL.of(path, f"is no mask ({type(err).__name__}: {err})") from err

    def read(self, key: str, size_px: tuple[int, int], kind: type[Target], classes: ClassTable) -> Said:
        """What was said of an image of this height and width.

        Raises: DamagedDataError for a file that is gone or holds something else.
        """
        stem = f"{self.rows[key]:05d}"
        try:
            said = _READERS[kind](lambda ending: (self.folder / f"{stem}{ending}").read_bytes(), classes, size_px)
            _check_size(said, size_px)
        except (*_WRONG, Image.DecompressionBombError) as err:
            size = "x".join(map(str, size_px))
            raise _REFUSAL.of(
                self.folder / stem,
                f"is no prediction of a {size} image ({type(err).__name__}: {err})",
            ) from err
        return said


Files = Callable[[str], bytes]
"""Content of a file of the prediction, by its ending."""


def _read_classes(files: Files, classes: ClassTable, _size_px: tuple[int, int]) -> ClassPrediction:
    probabilities = np.zeros(len(classes), np.float32)
    for name, probability in json.loads(files(".json"))["classes"].items():
        probabilities[classes.names.index(name)] = probability
    return ClassPrediction(probabilities)


def _read_mask(files: Files, classes: ClassTable, _size_px: tuple[int, int]) -> MaskPrediction:
    numbers = np.asarray(Image.open(io.BytesIO(files(".png")))).astype(np.int64)
    if numbers.ndim != 2 or numbers.max(initial=0) >= len(classes):
        raise ValueError("its values are not the classes'")
    return MaskPrediction(numbers)


def _read_objects(files: Files, classes: ClassTable, size_px: tuple[int, int]) -> Detections:
    entries = json.loads(files(".json"))
    boxes = np.array([entry["bbox"] for entry in entries], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if entries and "segmentation" in entries[0]:
        masks = np.stack([coco_mask.decode(entry["segmentation"]).astype(bool) for entry in entries])
    return Detections(
        size_px,
        boxes,
        np.array([_number(classes, entry["category_id"]) for entry in entries], np.int64),
        np.array([entry["score"] for entry in entries], np.float32),
        masks,
    )


def _read_segments(files: Files, classes: ClassTable, _size_px: tuple[int, int]) -> PanopticPrediction:
    colours = np.asarray(Image.open(io.BytesIO(files(".png")))).astype(np.int32)
    segments = colours[..., 0] + (colours[..., 1] << 8) + (colours[..., 2] << 16)
    known = {int(entry["id"]): _number(classes, entry["category_id"]) for entry in json.loads(files(".json"))}
    if not set(np.unique(segments).tolist()) <= {0, *known}:
        raise ValueError("it has segments without a class")
    return PanopticPrediction(segments.astype(np.int32), known)


_READERS: dict[type[Target], Callable[[Files, ClassTable, tuple[int, int]], Said]] = {
    Class: _read_classes,
    Mask: _read_mask,
    Instances: _read_objects,
    Panoptic: _read_segments,
}


def _number(classes: ClassTable, own: int) -> int:
    """The class number of the data set's own. Raises: ValueError."""
    numbers = [number for number in range(len(classes)) if classes.numbers.get(number, number) == own]
    if not numbers:
        raise ValueError(f"it has class {own}, which is none")
    return numbers[0]


def _check_size(said: Said, size_px: tuple[int, int]) -> None:
    arrays: Sequence[NDArray[Any] | None] = ()
    if isinstance(said, MaskPrediction):
        arrays = [said.numbers]
    elif isinstance(said, PanopticPrediction):
        arrays = [said.segments]
    elif isinstance(said, Detections):
        arrays = [said.masks]
    for array in arrays:
        if array is not None and array.shape[-2:] != size_px:
            raise ValueError(f"it is {array.shape}")


def as_said(target: Target, classes: ClassTable) -> Said:
    """The truth as a perfect network would say it; ignored pixels have a class that occurs, crowds are no objects."""
    if isinstance(target, Class):
        return ClassPrediction(np.eye(len(classes), dtype=np.float32)[target.number])
    if isinstance(target, Mask):
        known = target.known
        return MaskPrediction(np.where(known, target.numbers, target.numbers[known][0] if known.any() else 0))
    if isinstance(target, Panoptic):
        return PanopticPrediction(target.segments, target.classes)
    counts = target.counts
    boxes, classes_of = target.boxes[counts].astype(np.float32), target.classes[counts]
    masks = None if target.masks is None else target.masks[counts]
    return Detections(target.size_px, boxes, classes_of, np.ones(len(classes_of), np.float32), masks)
