"""Segmentation maps without labels: k-means over the cells of many images at once, as in the paper's figure 5.

One clustering per level and network, so that a colour means the same in every image. The regressor's output goes to the
teacher's clusters, since it should be the teacher's level. The backbone has features of its own, so clusters of its
own; each takes the colour of the teacher's cluster that it shares most cells with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.pipeline.extractors import TEACHER
from dtpipe.pipeline.report.maps.features import RunFeatures, SeenImages
from dtpipe.pipeline.report.maps.palette import enlarged

MOST_CELLS = 20_000
"""Cells of all images that one clustering is fitted to: drawn in each image, so that memory does not grow with them."""
REGRESSED, BACKBONE = "regressor", "backbone"

CellRows = NDArray[np.float32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Clustered:
    """Cluster numbers of the images that are shown."""

    num_images: int
    """How many the clusters were fitted to."""
    maps: Mapping[str, Mapping[str, Sequence[Numbers]]]
    """Network to level to an (h, w) of each image."""


def cluster_maps(features: RunFeatures, shown: SeenImages, num_images: int, num_clusters: int, seed: int) -> Clustered:
    """Clusters of the images shown and of others of the run, drawn by the seed.

    Where the teacher runs live, the images shown are all: each other one would cost a pass of it.
    Raises: what the dataset's readers raise.
    """
    parts: Iterable[SeenImages] = [shown]
    num = len(shown.keys)
    if not features.live:
        rows = features.choose(max(num_images, num), seed)
        parts, num = features.see_parts(rows), len(rows)
    sample = _Sample(max(1, MOST_CELLS // num), seed)
    for part in parts:
        sample.add(TEACHER, part.teacher)
        sample.add(BACKBONE, part.backbone)
    return Clustered(num, _numbered(sample, shown, num_clusters, seed))


def fit_clusters(cells: CellRows, num_clusters: int, seed: int) -> Any:
    """sklearn's MiniBatchKMeans of cells; fewer clusters where fewer cells differ. Shapes: (N, C)."""
    from sklearn.cluster import MiniBatchKMeans

    num = min(num_clusters, len(np.unique(cells, axis=0)))
    return MiniBatchKMeans(num, random_state=seed, n_init=3, batch_size=4096).fit(cells)


def predict_clusters(clusters: Any, levels: NDArray[np.float32]) -> list[Numbers]:
    """The cluster of each cell. Shapes: (N, C, h, w) -> N of (h, w)."""
    num, channels, height, width = levels.shape
    cells = np.ascontiguousarray(levels.transpose(0, 2, 3, 1).reshape(-1, channels))
    return list(clusters.predict(cells).astype(np.int64).reshape(num, height, width))


def matched(numbers: Sequence[Numbers], reference: Sequence[Numbers], num_clusters: int) -> Numbers:
    """New numbers of clusters: those that let most cells agree with a reference on the same images.

    Shapes: (h, w) and (h', w') of each image -> (num_clusters,), a permutation.
    """
    from scipy.optimize import linear_sum_assignment

    shared = np.zeros((num_clusters, num_clusters), np.int64)
    for own, other in zip(numbers, reference, strict=True):
        sides = (max(own.shape[0], other.shape[0]), max(own.shape[1], other.shape[1]))
        np.add.at(shared, (enlarged(own, *sides), enlarged(other, *sides)), 1)
    _, permutation = linear_sum_assignment(shared, maximize=True)
    return np.asarray(permutation, np.int64)


class _Sample:
    """Cells drawn from each image, by network and level."""

    def __init__(self, per_image: int, seed: int) -> None:
        self._per_image = per_image
        self._generator = np.random.Generator(np.random.Philox(seed))
        self._cells: dict[tuple[str, str], list[CellRows]] = {}

    def add(self, network: str, maps: Mapping[str, NDArray[np.float32]]) -> None:
        for name, levels in maps.items():
            for level in levels:
                cells = level.reshape(len(level), -1).T  # (h*w, C)
                if len(cells) > self._per_image:
                    cells = cells[self._generator.choice(len(cells), self._per_image, replace=False)]
                self._cells.setdefault((network, name), []).append(np.ascontiguousarray(cells))

    def fit(self, network: str, level: str, num_clusters: int, seed: int) -> Any:
        return fit_clusters(np.concatenate(self._cells[network, level]), num_clusters, seed)


def _numbered(
    sample: _Sample, shown: SeenImages, num_clusters: int, seed: int
) -> dict[str, dict[str, Sequence[Numbers]]]:
    maps: dict[str, dict[str, Sequence[Numbers]]] = {TEACHER: {}, REGRESSED: {}, BACKBONE: {}}
    reference: Sequence[Numbers] | None = None  # the finest level of the teacher
    for name in shown.teacher:
        clusters = sample.fit(TEACHER, name, num_clusters, seed)
        own = predict_clusters(clusters, shown.teacher[name])
        numbers = np.arange(num_clusters) if reference is None else matched(own, reference, num_clusters)
        maps[TEACHER][name] = [numbers[cells] for cells in own]
        maps[REGRESSED][name] = [numbers[cells] for cells in predict_clusters(clusters, shown.regressed[name])]
        reference = maps[TEACHER][name] if reference is None else reference
        if name in shown.backbone:
            backbone = predict_clusters(sample.fit(BACKBONE, name, num_clusters, seed), shown.backbone[name])
            numbers = matched(backbone, maps[TEACHER][name], num_clusters)
            maps[BACKBONE][name] = [numbers[cells] for cells in backbone]
    return maps
