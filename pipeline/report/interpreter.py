"""The interpreter whose soft labels a run learned: how it and its rivals score on held-out images, with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.labels.files import LoadedInterpreter, load_interpreter
from dtpipe.manifests.errors import DtpipeError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.pipeline.live.recorded import recorded_soft_labels
from dtpipe.pipeline.report.section import LeaveOut, Section, data_uri, render


def interpreter_sections(settings: DistillConfig, num_images: int, leave_out: LeaveOut) -> list[Section]:
    """A section of each interpreter that a run learned from, whose folder says how it scored; one that is gone is left
    out.
    """
    sections = []
    for url in () if settings.labels.weight == 0 else settings.datasets or ("",):
        try:
            folder = _folder(url, settings.interpreter)
            sections += [] if folder is None else list(_sections(Path(folder[0]), folder[1], num_images))
        except DtpipeError as err:
            leave_out(f"interpreter of {url or 'the live labels'}", err)
    return sections


def _folder(url: str, given: str | None) -> tuple[str, str | None] | None:
    """Where the interpreter of some soft labels lies, and its digest; None of a dataset without soft labels."""
    if not url:
        return None if given is None else (given, None)
    dataset = FeatureDataset.open(url, allow_incomplete=True)
    labels = soft_labels_of(dataset.recipe)
    if labels is None:
        return None
    recorded = recorded_soft_labels(dataset.plan).get("interpreter")
    folder = given or recorded
    return None if folder is None else (folder, labels.head_blake3)


def _sections(folder: Path, digest: str | None, num_images: int) -> Iterator[Section]:
    """Raises: InputError where another interpreter lies there; as `load_interpreter`."""
    loaded = load_interpreter(folder)
    if digest not in (None, loaded.digest):
        raise InputError(f"{folder} holds another interpreter than the one that made the labels; put that one back")
    scores: Mapping[str, Any] = loaded.record.get("scores") or {}
    if not scores:
        return
    data = loaded.record.get("data") or {}
    pictures = sorted((folder / "pictures").glob("*.png"))[:num_images]
    yield Section(
        "Interpreter",
        render(
            "interpreter.html",
            folder=str(folder),
            num_labelled=data.get("num_labelled"),
            num_held_out=data.get("num_held_out"),
            arms=list(scores),
            rows=_rows(loaded, list(scores.values())),
            pictures=[_picture(path) for path in pictures],
        ),
    )


def _rows(loaded: LoadedInterpreter, arms: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The measure, what stands beside it, and each class."""
    spec = loaded.network.spec
    rows = [("accuracy" if spec.kind == "classes" else "mIoU", [arm["value"] for arm in arms])]
    others = dict.fromkeys(name for arm in arms for name in arm["others"])
    rows += [(name, [arm["others"].get(name) for arm in arms]) for name in others]
    rows += [(name, [arm["by_class"].get(name) for arm in arms]) for name in spec.classes.names]
    return [(name, ["-" if value is None else f"{value:.3f}" for value in values]) for name, values in rows]


def _picture(path: Path) -> str:
    """Raises: InputError for a file that is no picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return data_uri(np.asarray(image.convert("RGB")))
    except OSError as err:
        raise InputError(f"{path}: is no picture ({err}); delete it, and run `dtpipe interpret` again") from err
