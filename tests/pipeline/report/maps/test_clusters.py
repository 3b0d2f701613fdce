"""Clusters are k-means' own, mean the same in every image, and take the colours of the teacher's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score

from dtpipe.distill.student.load import load_student
from dtpipe.pipeline.extractors import TEACHER
from dtpipe.pipeline.report.maps.clusters import (
    BACKBONE,
    MOST_CELLS,
    REGRESSED,
    Clustered,
    cluster_maps,
    fit_clusters,
    matched,
    predict_clusters,
)
from dtpipe.pipeline.report.maps.features import RunFeatures, SeenImages
from dtpipe.pipeline.report.training import read_run_config


def blobs(num: int, channels: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cells around well separated centres, and which of them each belongs to."""
    rng = np.random.default_rng(seed)
    belongs = rng.integers(groups, size=num)
    centres = np.random.default_rng(9).normal(size=(groups, channels)) * 20
    return (centres[belongs] + rng.normal(size=(num, channels))).astype(np.float32), belongs


def as_levels(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shapes: (N*h*w, C) -> (N, C, h, w)."""
    return cells.reshape(-1, height, width, cells.shape[1]).transpose(0, 3, 1, 2)


def test_each_cell_has_the_number_that_sklearn_predicts() -> None:
    cells, _ = blobs(240, 6, 4)
    numbers = predict_clusters(fit_clusters(cells, 7, seed=3), as_levels(cells, 8, 10))
    expected = MiniBatchKMeans(7, random_state=3, n_init=3, batch_size=4096).fit(cells).predict(cells)
    assert_array_equal(np.stack(numbers), expected.reshape(3, 8, 10))


def test_groups_that_lie_apart_are_found_as_full_k_means_finds_them() -> None:
    cells, belongs = blobs(600, 6, 5)
    numbers = np.stack(predict_clusters(fit_clusters(cells, 5, seed=0), as_levels(cells, 10, 12))).ravel()
    assert adjusted_rand_score(numbers, belongs) == 1
    assert adjusted_rand_score(numbers, KMeans(5, random_state=1, n_init=3).fit_predict(cells)) == 1


def test_no_more_clusters_than_cells_that_differ() -> None:
    cells = np.repeat(np.eye(3, dtype=np.float32), 8, axis=0)
    numbers = np.stack(predict_clusters(fit_clusters(cells, 10, seed=0), as_levels(cells, 4, 6)))
    assert len(np.unique(numbers)) == 3


def test_numbers_are_matched_to_a_reference_of_another_size() -> None:
    reference = [np.array([[0, 1], [2, 3]]), np.array([[3, 3], [1, 0]])]
    permutation = np.array([2, 0, 3, 1])
    finer = [np.repeat(np.repeat(permutation[cells], 3, axis=0), 3, axis=1) for cells in reference]
    finer[0][0, 0] = 3  # one cell of another cluster does not outvote the rest
    numbers = matched(finer, reference, 5)
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    assert_array_equal(numbers[permutation], [0, 1, 2, 3])


# --- of a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(small_run: Path) -> RunFeatures:
    return RunFeatures.open(small_run, read_run_config(small_run))


@pytest.fixture(scope="module")
def shown(features: RunFeatures) -> SeenImages:
    return features.see(features.choose(3, seed=1))


@pytest.fixture(scope="module")
def clustered(features: RunFeatures, shown: SeenImages) -> Clustered:
    return cluster_maps(features, shown, num_images=6, num_clusters=5, seed=1)


def test_a_run_has_maps_of_teacher_regressor_and_backbone_at_every_level(
    shown: SeenImages, clustered: Clustered
) -> None:
    assert clustered.num_images == 6
    assert list(clustered.maps) == [TEACHER, REGRESSED, BACKBONE]
    for levels in clustered.maps.values():
        assert {name: cells[0].shape for name, cells in levels.items()} == {"l2": (8, 8), "l3": (4, 4)}
        assert all(len(cells) == len(shown.keys) == 3 for cells in levels.values())


def test_colours_of_regressor_and_teacher_are_those_of_one_clustering(
    features: RunFeatures, shown: SeenImages, clustered: Clustered
) -> None:
    """The nearest centre, by brute force in float64, for both."""
    seen = features.see(features.choose(6, seed=1))
    level = seen.teacher["l2"]
    cells = level.transpose(0, 2, 3, 1).reshape(-1, level.shape[1])  # all: fewer than are drawn of larger levels
    assert len(cells) < MOST_CELLS
    centres = fit_clusters(cells, 5, seed=1).cluster_centers_.astype(np.float64)
    for network, maps in ((TEACHER, shown.teacher), (REGRESSED, shown.regressed)):
        own = maps["l2"].astype(np.float64).transpose(0, 2, 3, 1)
        nearest = np.square(own[..., None, :] - centres).sum(axis=-1).argmin(axis=-1)
        assert_array_equal(np.stack(clustered.maps[network]["l2"]), nearest)


def test_equal_cells_have_one_colour_in_every_image(features: RunFeatures, shown: SeenImages) -> None:
    """Shown twice under another key, an image looks the same."""
    twice = SeenImages(
        (*shown.keys, "again"),
        np.concatenate([shown.images, shown.images[:1]]),
        *(
            {name: np.concatenate([level, level[:1]]) for name, level in maps.items()}
            for maps in (shown.teacher, shown.regressed, shown.backbone)
        ),
    )
    maps = cluster_maps(features, twice, num_images=6, num_clusters=5, seed=1).maps
    for levels in maps.values():
        for cells in levels.values():
            assert_array_equal(cells[0], cells[3])


def test_memory_is_bounded_by_cells_drawn_from_each_image(
    features: RunFeatures, shown: SeenImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[int] = []

    def watch(cells: np.ndarray, num_clusters: int, seed: int) -> object:
        fitted.append(len(cells))
        return fit_clusters(cells, num_clusters, seed)

    monkeypatch.setattr("dtpipe.pipeline.report.maps.clusters.MOST_CELLS", 200)
    monkeypatch.setattr("dtpipe.pipeline.report.maps.clusters.fit_clusters", watch)
    cluster_maps(features, shown, num_images=6, num_clusters=5, seed=1)
    assert sorted(fitted) == [6 * 16, 6 * 16, 6 * 33, 6 * 33]  # all cells of l3, 33 of the 64 of l2


def test_backbone_levels_are_those_of_the_runs_student(small_run: Path, shown: SeenImages) -> None:
    student = load_student(small_run)
    images = torch.from_numpy(shown.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        levels = {level.shape[-1]: level for level in student.net(student.normalise(images))}
    assert sorted(shown.backbone) == ["l2", "l3"]
    for level in shown.backbone.values():
        np.testing.assert_allclose(
            level, levels[level.shape[-1]].numpy(), rtol=1e-5, atol=1e-5
        )  # other batches round otherwise
