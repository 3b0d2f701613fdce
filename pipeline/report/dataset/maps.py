"""Segmentation maps of a dataset's own levels: k-means over the cells of many images, as in the paper's figure 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.phases import counted
from dtpipe.manifests.read.source import read_images
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report.dataset.look import stacks_of
from dtpipe.pipeline.report.dataset.opened import OpenedDatasets
from dtpipe.pipeline.report.maps.clusters import MOST_CELLS, fit_clusters, matched, predict_clusters
from dtpipe.pipeline.report.maps.features import RowIdxs
from dtpipe.pipeline.report.maps.palette import shrunk
from dtpipe.pipeline.report.maps.sections import MOST_PX, Row, cluster_picture
from dtpipe.pipeline.report.section import Section, data_uri, render

_Levels = Mapping[str, NDArray[np.float32]]


def dataset_maps(opened: OpenedDatasets, rows: RowIdxs, config: ReportConfig) -> Section:
    """Clusters of the cells of some of the rows, shown over the images, or alone where no images are stored."""
    generator = np.random.Generator(np.random.Philox(config.seed))
    num = min(len(rows), max(config.cluster_images, config.num_images))
    fitted = np.sort(generator.choice(rows, num, replace=False))
    names = [level.name for level in opened.source.levels if level.role != "latent"]
    cells: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    quota = max(1, MOST_CELLS // len(fitted))
    for row in counted(fitted, len(fitted), "cells of images"):
        for name, level in _levels(opened, np.array([row]), names).items():
            own = level[0].reshape(level.shape[1], -1).T
            few = own if len(own) <= quota else own[generator.choice(len(own), quota, replace=False)]
            cells[name].append(np.ascontiguousarray(few))
    shown = fitted[: config.num_images]
    levels = _levels(opened, shown, names)
    maps: dict[str, Sequence[NDArray[np.int64]]] = {}
    for name in counted(names, len(names), "clusters of levels"):
        own = predict_clusters(fit_clusters(np.concatenate(cells[name]), config.clusters, config.seed), levels[name])
        reference = next(iter(maps.values()), None)
        order = np.arange(config.clusters) if reference is None else matched(own, reference, config.clusters)
        maps[name] = [order[numbers] for numbers in own]
    return _section(opened, shown, maps, len(fitted), config)


def _levels(opened: OpenedDatasets, rows: RowIdxs, names: Sequence[str]) -> _Levels:
    view = stacks_of(opened.source)[0].views[0]
    _, coded = opened.source.read(rows, names, np.full(len(rows), view), images=False)
    return {name: level.astype(np.float32) for name, level in coded.decode().items()}


def _section(
    opened: OpenedDatasets,
    rows: RowIdxs,
    maps: Mapping[str, Sequence[NDArray[np.int64]]],
    num_images: int,
    config: ReportConfig,
) -> Section:
    source = opened.source
    images = (
        read_images(source, rows) if opened.has_images else np.full((len(rows), *source.image_px, 3), 128, np.uint8)
    )
    table = []
    for idx, row in enumerate(rows):
        image = shrunk(images[idx], MOST_PX)
        pictures = [data_uri(cluster_picture(image, maps[name][idx])) for name in maps]
        table.append((source.columns.keys[row], data_uri(image), [Row("", pictures)]))
    html = render(
        "maps.html",
        kind="clusters of a dataset",
        columns=[(name, "") for name in maps],
        images=table,
        num_images=num_images,
        num_clusters=config.clusters,
    )
    return Section("Segmentation maps", html)
