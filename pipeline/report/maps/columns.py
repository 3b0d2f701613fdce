"""Maps of the same images from several runs, a column per run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.config import DistillConfig
from dtpipe.manifests.errors import DtpipeError, InputError
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.extractors import TEACHER
from dtpipe.pipeline.report.maps.clusters import BACKBONE, cluster_maps
from dtpipe.pipeline.report.maps.features import RunFeatures, SeenImages, pca_pairs, run_keys
from dtpipe.pipeline.report.maps.palette import shrunk
from dtpipe.pipeline.report.maps.sections import MOST_PX, Row, cluster_picture
from dtpipe.pipeline.report.section import Notes, Section, data_uri, render

Pictures = Mapping[str, Sequence[NDArray[np.uint8]]]
"""Level to a picture of each image."""


@dataclass(frozen=True)
class RunMaps:
    """What one run gives to the page."""

    images: NDArray[np.uint8]
    teacher: dict[str, Pictures] = field(default_factory=dict)
    """Of each kind of map."""
    student: dict[str, Pictures] = field(default_factory=dict)


_KINDS = {"pca": "Feature maps", "clusters": "Segmentation maps"}


def column_sections(
    runs: Mapping[str, tuple[Path, DistillConfig]], config: ReportConfig, notes: Notes
) -> Iterator[Section]:
    """Feature maps of the regressors, and segmentation maps of the backbones; runs that have none are left out."""
    keys = _common_keys(runs, config, notes)
    maps: dict[str, RunMaps] = {}
    for name, known in keys.items():
        run, settings = runs[name]
        try:
            maps[name] = _run_maps(RunFeatures.open(run, settings), known, config)
        except DtpipeError as err:
            notes.leave_out(f"maps of {name}", err)
    if not maps:
        return
    shown = next(iter(keys.values()))
    for kind, title in _KINDS.items():
        columns, images = _table(shown, maps, kind)
        html = render("maps.html", kind=f"{kind} of runs", columns=[(name, "") for name in columns], images=images)
        yield Section(title, html)


def _common_keys(
    runs: Mapping[str, tuple[Path, DistillConfig]], config: ReportConfig, notes: Notes
) -> dict[str, list[str]]:
    """By run, the images to show: some of those that all runs have, drawn by the seed."""
    known: dict[str, list[str]] = {}
    for name, (run, settings) in runs.items():
        try:
            known[name] = run_keys(run, settings)
        except DtpipeError as err:
            notes.leave_out(f"maps of {name}", err)
    common = sorted(set.intersection(*map(set, known.values()))) if known else []
    if known and not common:
        notes.leave_out("maps", InputError(f"no image is in all of {', '.join(known)}; a page for each shows its own"))
    if not common:
        return {}
    generator = np.random.Generator(np.random.Philox(config.seed))
    chosen = sorted(generator.choice(len(common), size=min(config.num_images, len(common)), replace=False))
    return {name: [common[idx] for idx in chosen] for name in known}


def _run_maps(features: RunFeatures, keys: Sequence[str], config: ReportConfig) -> RunMaps:
    seen = features.see(features.rows_of(keys))
    pairs = pca_pairs(seen)
    clustered = cluster_maps(features, seen, config.cluster_images, config.clusters, config.seed).maps
    maps = RunMaps(np.stack([shrunk(image, MOST_PX) for image in seen.images]))
    for place, pictures in enumerate((maps.teacher, maps.student)):
        pictures["pca"] = {name: [pair[place] for pair in level] for name, level in pairs.items()}
    maps.teacher["clusters"] = _overlays(seen, clustered[TEACHER], maps.images)
    maps.student["clusters"] = _overlays(seen, clustered[BACKBONE], maps.images)
    return maps


def _overlays(
    seen: SeenImages, levels: Mapping[str, Sequence[NDArray[np.int64]]], images: NDArray[np.uint8]
) -> Pictures:
    return {
        name: [cluster_picture(image, cells) for image, cells in zip(images, levels[name], strict=True)]
        for name in seen.teacher
        if name in levels
    }


def _table(
    keys: Sequence[str], maps: Mapping[str, RunMaps], kind: str
) -> tuple[list[str], list[tuple[str, str, list[Row]]]]:
    """Columns, and per image its lines by level."""
    columns: dict[str, Pictures] = {}
    for name, one in maps.items():
        if not any(_equal(one.teacher[kind], pictures) for pictures in columns.values()):
            columns[f"teacher of {name}"] = one.teacher[kind]
        columns[name] = one.student[kind]
    if sum(name.startswith("teacher of ") for name in columns) == 1:
        columns = {"teacher" if name.startswith("teacher of ") else name: part for name, part in columns.items()}
    levels = sorted({level for pictures in columns.values() for level in pictures}, key=lambda name: (len(name), name))
    first = next(iter(maps.values()))
    images = []
    for idx, key in enumerate(keys):
        rows = [
            Row(level, [data_uri(part[level][idx]) if level in part else None for part in columns.values()])
            for level in levels
        ]
        images.append((key, data_uri(first.images[idx]), rows))
    return list(columns), images


def _equal(one: Pictures, other: Pictures) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(a, b) for level in one for a, b in zip(one[level], other[level], strict=True)
    )
