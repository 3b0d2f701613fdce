"""Colours are fixed and differ; overlays blend them with the grey photograph, cell by cell."""

from __future__ import annotations

import numpy as np
from numpy.testing import assert_array_equal

from dtpipe.pipeline.report.maps.palette import STRENGTH, colours_of, enlarged, overlay, shrunk


def test_colours_are_fixed_and_differ() -> None:
    colours = colours_of(200)
    assert_array_equal(colours[:7], colours_of(7))
    assert len(np.unique(colours, axis=0)) == 200
    assert colours_of(0).shape == (0, 3)


def test_cells_are_enlarged_by_nearest_neighbours() -> None:
    cells = np.array([[0, 1, 2], [3, 4, 5]])
    assert_array_equal(enlarged(cells, 4, 6), np.kron(cells, np.ones((2, 2), int)))
    assert_array_equal(enlarged(cells, 2, 3), cells)
    assert_array_equal(enlarged(np.array([[0, 1]]), 1, 5), [[0, 0, 0, 1, 1]])


def test_overlay_blends_colour_and_grey_and_leaves_the_rest() -> None:
    image = np.array([[[30, 60, 90], [30, 60, 90]]], np.uint8)
    shown = overlay(image, np.array([[1, -1]]), np.array([[0, 0, 0], [200, 100, 0]], np.uint8))
    assert_array_equal(shown[0, 1], image[0, 1])
    expected = [STRENGTH * colour + (1 - STRENGTH) * 60 for colour in (200, 100, 0)]
    assert_array_equal(shown[0, 0], np.rint(expected))


def test_large_images_are_shrunk_in_their_aspect() -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    assert shrunk(image, 150).shape == (50, 150, 3)
    assert shrunk(image, 300) is image
