"""Nearest neighbours: which other images a backbone, and its teacher, take for most alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.words import count_of
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.extractors import TEACHER
from dtpipe.pipeline.report.maps.clusters import BACKBONE
from dtpipe.pipeline.report.maps.features import RunFeatures, SeenImages
from dtpipe.pipeline.report.maps.palette import shrunk
from dtpipe.pipeline.report.section import Section, data_uri, render

NUM_NEIGHBOURS, AMONG = 5, 64
_PICTURE_PX = 96
_Vectors = NDArray[np.float64]


def neighbour_section(features: RunFeatures, config: ReportConfig) -> Section | None:
    """Some images with those nearest to them among others of the run; None where the teacher runs live, or images are
    too few."""
    if features.live:
        return None
    rows = features.choose(max(AMONG, config.cluster_images), config.seed)
    if len(rows) < NUM_NEIGHBOURS + 2:
        return None
    vectors: dict[str, list[_Vectors]] = {TEACHER: [], BACKBONE: []}
    images, keys = [], list[str]()
    for part in features.see_parts(rows):
        images += [shrunk(image, _PICTURE_PX) for image in part.images]
        keys += part.keys
        for network, maps in (TEACHER, part.teacher), (BACKBONE, part.backbone):
            vectors[network].append(pooled_vectors(maps, part))
    nearest = {network: nearest_idx(np.concatenate(parts), NUM_NEIGHBOURS) for network, parts in vectors.items()}
    shown = [
        (
            keys[idx],
            data_uri(images[idx]),
            [
                {"name": network, "pictures": [data_uri(images[other]) for other in order[idx]]}
                for network, order in nearest.items()
            ],
        )
        for idx in range(min(config.num_images, len(images)))
    ]
    columns = [(str(place), "") for place in range(1, NUM_NEIGHBOURS + 1)]
    num = count_of(len(images), "image")
    return Section("Nearest neighbours", render("maps.html", kind="neighbours", columns=columns, images=shown, num=num))


def pooled_vectors(maps: Mapping[str, NDArray[np.float32]], seen: SeenImages) -> _Vectors:
    """The mean of the coarsest level over positions. Shapes: -> (N, C)."""
    if not maps:
        return np.zeros((len(seen.keys), 1))
    coarsest = min(maps.values(), key=lambda level: level.shape[-2] * level.shape[-1])
    return np.asarray(coarsest.mean(axis=(2, 3)), np.float64)


def nearest_idx(vectors: _Vectors, num: int) -> NDArray[np.int64]:
    """The most alike by cosine, channels centred over the images, nearest first; none is its own neighbour.

    Shapes: (N, C) -> (N, num).
    """
    centred = vectors - vectors.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -np.inf)
    return np.argsort(-alike, axis=1, kind="stable")[:, :num].astype(np.int64)
