"""The pictures of the page: feature maps, segmentation maps, activation maps, samples of the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.config import DistillConfig
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.phases import counted, phase
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report.maps.activations import (
    Energy,
    TimestepTeacher,
    diffusion_teacher,
    heat,
    level_captions,
    seen_energies,
)
from dtpipe.pipeline.report.maps.clusters import Clustered, cluster_maps
from dtpipe.pipeline.report.maps.features import RunFeatures, SeenImages, backbone_pictures, pca_pairs
from dtpipe.pipeline.report.maps.neighbours import neighbour_section
from dtpipe.pipeline.report.maps.palette import colours_of, overlay, shrunk
from dtpipe.pipeline.report.section import Notes, Section, data_uri, render

_MOST_ACTIVATED = 2  # images: each costs a pass of the teacher per timestep
MOST_PX = 192  # longer side of a picture on the page
SAMPLE_COLUMNS = 8


@dataclass(frozen=True)
class Row:
    """A line of pictures beside an image."""

    name: str
    pictures: Sequence[str | None]


def map_sections(run: Path, settings: DistillConfig, config: ReportConfig, notes: Notes) -> Iterator[Section]:
    """Sections of a run's pictures; those that cannot be made are left out with a note."""
    try:
        features = RunFeatures.open(run, settings)
        shown = features.see(features.choose(config.num_images, config.seed))
    except DtpipeError as err:
        notes.leave_out("feature maps", err)
    else:
        yield feature_section(shown)
        yield from _segmentation(features, shown, config, notes)
        yield from _neighbours(features, config, notes)
        yield from _activations(run, settings, shown, config, notes)
    if config.teacher is not None:
        yield from _samples(config.teacher, config)


def feature_section(shown: SeenImages) -> Section:
    """Teacher and regressor in one PCA basis per level."""
    pairs, own = pca_pairs(shown), backbone_pictures(shown)
    errors = shown.errors()
    columns = [(name, f"error {errors[name]:.2f}") for name in pairs]
    images = [
        (
            *_photograph(shown, idx),
            [
                Row(who, [data_uri(pairs[name][idx][place]) for name in pairs])
                for place, who in enumerate(("teacher", "student"))
            ]
            + [Row("backbone", [data_uri(own[name][idx]) if name in own else None for name in pairs])],
        )
        for idx in range(len(shown.keys))
    ]
    return Section("Feature maps", render("maps.html", kind="pca", columns=columns, images=images))


def _segmentation(features: RunFeatures, shown: SeenImages, config: ReportConfig, notes: Notes) -> Iterator[Section]:
    try:
        with phase("clusters of cells"):
            clustered = cluster_maps(features, shown, config.cluster_images, config.clusters, config.seed)
    except DtpipeError as err:
        notes.leave_out("segmentation maps", err)
        return
    images = [(*_photograph(shown, idx), list(cluster_rows(shown, clustered, idx))) for idx in range(len(shown.keys))]
    html = render(
        "maps.html",
        kind="clusters",
        columns=[(name, "") for name in shown.teacher],
        images=images,
        num_images=count_of(clustered.num_images, "image"),
        num_clusters=config.clusters,
    )
    yield Section("Segmentation maps", html)


def cluster_rows(shown: SeenImages, clustered: Clustered, idx: int) -> Iterator[Row]:
    """Overlays of one image, a line per network."""
    image = shrunk(shown.images[idx], MOST_PX)
    for network, levels in clustered.maps.items():
        yield Row(
            network,
            [data_uri(cluster_picture(image, levels[name][idx])) if name in levels else None for name in shown.teacher],
        )


def cluster_picture(image: NDArray[np.uint8], numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Cluster numbers as colours over an image. Shapes: (H, W, 3), (h, w) -> (H, W, 3)."""
    return overlay(image, numbers, colours_of(int(numbers.max()) + 1))


def _neighbours(features: RunFeatures, config: ReportConfig, notes: Notes) -> Iterator[Section]:
    try:
        section = neighbour_section(features, config)
    except DtpipeError as err:
        notes.leave_out("nearest neighbours", err)
        return
    if section is not None:
        yield section


def _activations(
    run: Path, settings: DistillConfig, shown: SeenImages, config: ReportConfig, notes: Notes
) -> Iterator[Section]:
    columns: dict[str, str] = {}
    by_timestep: Sequence[Sequence[Row]] = []
    try:
        if config.timesteps:
            teacher = diffusion_teacher(run, settings)
            by_timestep = [list(rows) for rows in _rows_by_timestep(teacher, shown, config)]
            columns.update(level_captions(teacher.teacher))
    except DtpipeError as err:
        notes.leave_out("activation maps of the teacher", err)
    for name in shown.teacher:
        columns.setdefault(name, "")
    yield activation_section(shown, by_timestep, columns)


def _rows_by_timestep(teacher: TimestepTeacher, shown: SeenImages, config: ReportConfig) -> Iterator[Iterator[Row]]:
    """Of each image, a line per timestep."""
    timesteps = [step for step in config.timesteps if step < (teacher.teacher.spec.num_timesteps or 0)]
    captions, keys = level_captions(teacher.teacher), shown.keys[:_MOST_ACTIVATED]
    for idx, key in enumerate(counted(keys, len(keys), "activations of the teacher")):
        maps = teacher.energies(shown.images[idx], key, timesteps, config.seed)
        yield (energy_row(f"timestep {step}", levels, captions) for step, levels in zip(timesteps, maps, strict=True))


def activation_section(shown: SeenImages, by_timestep: Sequence[Sequence[Row]], columns: Mapping[str, str]) -> Section:
    """Lines of the timesteps, where there are any, above those of the networks at the view that is shown."""
    images = []
    for idx in range(min(_MOST_ACTIVATED, len(shown.keys))):
        seen = [energy_row(network, levels, columns) for network, levels in seen_energies(shown, idx).items()]
        images.append((*_photograph(shown, idx), [*(by_timestep[idx] if by_timestep else ()), *seen]))
    html = render(
        "maps.html", kind="activations", columns=list(columns.items()), images=images, by_timestep=bool(by_timestep)
    )
    return Section("Activation maps", html)


def energy_row(name: str, levels: Mapping[str, Energy], columns: Iterable[str]) -> Row:
    """A line of maps, empty at levels that are not among them."""
    return Row(name, [data_uri(heat(levels[column])) if column in levels else None for column in columns])


def _photograph(shown: SeenImages, idx: int) -> tuple[str, str]:
    return shown.keys[idx], data_uri(shrunk(shown.images[idx], MOST_PX))


def _samples(path: str, config: ReportConfig) -> Iterator[Section]:
    teacher: Any = load_teacher(TeacherConfig(path=path), pick_device("auto"))
    if not hasattr(teacher, "sample"):
        return
    images = np.asarray(teacher.sample(config.num_samples, config.seed, config.sample_steps))
    grid = image_grid(images, min(SAMPLE_COLUMNS, len(images)))
    drawn = f"{count_of(len(images), 'sample')}, {count_of(config.sample_steps, 'denoising step')}"
    caption = f"{drawn}, seed {config.seed}, not selected. What the teacher cannot draw it can hardly teach."
    width = max(grid.shape[1], min(1000, 2 * grid.shape[1]))
    yield Section("Samples of the teacher", render("samples.html", image=data_uri(grid), width=width, caption=caption))


def image_grid(images: NDArray[np.uint8], columns: int, gap: int = 2) -> NDArray[np.uint8]:
    """A grid of equal images with white gaps. Shapes: (N, H, W, 3) uint8 -> (rows, columns, 3)."""
    num, height, width, _ = images.shape
    rows = -(-num // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for idx, image in enumerate(images):
        top, left = (idx // columns) * (height + gap), (idx % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
