"""Pictures for the report: what teacher and student see in a few images, level by level, and samples of the teacher.

Teacher and student are shown in one PCA basis per level, so that equal colours mean equal features. It is the
teacher's, over all images shown: a student far off would else take the colours for itself, and the teacher would look
flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.config import DistillConfig, DistillRecipeConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.losses.base import whiten
from dtpipe.distill.stream.batch import student_images
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.student.distiller import Distiller, build_distiller, choose_levels, student_size
from dtpipe.distill.student.load import student_state
from dtpipe.manifests.read.source import FeatureSource, read_images
from dtpipe.manifests.schema import LevelSpec
from dtpipe.pipeline.live.data import recorded_data
from dtpipe.pipeline.report.pca import pca_to_rgb

Picture = NDArray[np.uint8]
Features = Mapping[str, NDArray[np.generic]]
Read = Callable[[NDArray[np.int64], Sequence[str]], tuple[Picture, Features]]


@dataclass(frozen=True)
class ShownImage:
    """One image and its maps: level name to (teacher, student) pictures, each (h, w, 3) uint8."""

    key: str
    image: Picture
    maps: dict[str, tuple[Picture, Picture]]


@dataclass(frozen=True)
class ShownMaps:
    """Images with maps, and per level how close the student's output is to the whitened teacher's: mean squared
    error."""

    images: list[ShownImage]
    errors: dict[str, float]
    """Per level; 1 is what a constant zero would get, since whitened features have unit variance."""


def load_distiller(
    run: Path, config: DistillRecipeConfig, levels: Sequence[LevelSpec], image_px: tuple[int, int]
) -> Distiller:
    """Student and regressor of a run's last checkpoint, in eval mode on the CPU."""
    state = load_checkpoint(run / "last.pt", "distill")
    unpretrained = config.model_copy(update={"student": config.student.model_copy(update={"pretrained": False})})
    model = build_distiller(unpretrained, levels, image_px)
    model.student.load_state_dict(student_state(state, ema=True))
    model.regressor.load_state_dict(state["regressor"])
    return model.eval()


def draw_maps(run: Path, config: DistillConfig, num_images: int, seed: int) -> ShownMaps:
    """Maps of a few images of the run's data, chosen by `seed`; the first unflipped view, or of live training its
    first draw.

    Raises: what the dataset's readers raise, or what loading the live teacher raises.
    """
    import torch

    data, read = _open(run, config)
    levels = choose_levels(data.source.levels, config.levels)
    names = [level.name for level in levels]
    image_px = student_size(config, data.student_px)
    model = load_distiller(run, config, levels, image_px)
    columns = data.source.columns
    rows = np.asarray(data.sampling.rows if data.sampling else columns.ok_rows)
    generator = np.random.Generator(np.random.Philox(seed))
    rows = np.sort(generator.choice(rows, size=min(num_images, len(rows)), replace=False))
    images, features = read(rows, names)
    with torch.inference_mode():
        regressed = model(student_images(torch.from_numpy(images), image_px))
        teacher = {name: whiten(torch.from_numpy(features[name]), config.loss.whiten) for name in names}
        errors = {name: float((regressed[name].float() - teacher[name]).square().mean()) for name in names}
    pairs = {name: _pair(teacher[name].numpy(), regressed[name].float().numpy()) for name in names}
    shown = [
        ShownImage(columns.keys[row], images[idx], {name: (pairs[name][0][idx], pairs[name][1][idx]) for name in names})
        for idx, row in enumerate(rows)
    ]
    return ShownMaps(shown, errors)


def _open(run: Path, config: DistillConfig) -> tuple[OpenedData, Read]:
    """The run's data, and how to read images and features of some of its rows: stored, or encoded now on the CPU."""
    import torch

    here = config.run.model_copy(update={"out": str(run), "device": "cpu"})  # a run folder may have been moved
    config = config.model_copy(update={"run": here})
    data = recorded_data(run, config)
    opened = data.open(config)
    teacher = data.teacher(opened.source, torch.device("cpu"))
    return opened, partial(_read_stored, opened.source) if teacher is None else partial(_encode, teacher, opened.source)


def _read_stored(source: FeatureSource, rows: NDArray[np.int64], names: Sequence[str]) -> tuple[Picture, Features]:
    unflipped = next((idx for idx, view in enumerate(source.views) if not view.flip), 0)
    images, coded = source.read(rows, names, np.full(len(rows), unflipped))
    return images, coded.decode()


def _encode(
    teacher: LiveTeacher, source: FeatureSource, rows: NDArray[np.int64], _names: Sequence[str]
) -> tuple[Picture, Features]:
    import torch

    samples = LiveSamples.first([source.columns.keys[row] for row in rows])
    images, levels = teacher.encode(torch.from_numpy(read_images(source, rows)), samples, teacher.prepare(samples))
    return images.numpy(), {name: level.float().numpy() for name, level in levels.items()}


def _pair(teacher: NDArray[np.float32], student: NDArray[np.float32]) -> tuple[list[Picture], list[Picture]]:
    """Shapes: (B, C, h, w) twice -> B pictures (h, w, 3) of each."""
    pictures = pca_to_rgb([*teacher, *student], num_deciding=len(teacher))
    return pictures[: len(teacher)], pictures[len(teacher) :]


def image_grid(images: NDArray[np.uint8], columns: int, gap: int = 2) -> Picture:
    """A grid of equal images with white gaps. Shapes: (N, H, W, 3) uint8 -> (rows, columns, 3)."""
    num, height, width, _ = images.shape
    rows = -(-num // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for idx, image in enumerate(images):
        top, left = (idx // columns) * (height + gap), (idx % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
