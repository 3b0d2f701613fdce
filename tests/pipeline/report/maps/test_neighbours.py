"""Nearest neighbours against scikit-learn's."""

from __future__ import annotations

import numpy as np
from numpy.testing import assert_array_equal
from sklearn.neighbors import NearestNeighbors

from dtpipe.pipeline.report.maps.neighbours import nearest_idx


def test_neighbours_are_those_of_scikit_learn_by_cosine_of_what_differs_from_the_mean() -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 7)) + 5
    centred = vectors - vectors.mean(axis=0)
    expected = NearestNeighbors(n_neighbors=4, metric="cosine").fit(centred).kneighbors(return_distance=False)
    assert_array_equal(nearest_idx(vectors, 4), expected)
