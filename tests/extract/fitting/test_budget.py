"""Bytes divided over levels: against a search over all divisions, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dtpipe.extract.fitting.budget import CURVE_ERRORS, Curve, divide


def curve(cells: int) -> Curve:
    """Of Gaussian numbers: half a bit more for each halving of the error, by number."""
    return Curve(CURVE_ERRORS, tuple(cells * -0.5 * float(np.log2(error)) / 8 for error in CURVE_ERRORS))


@pytest.mark.parametrize("view_bytes", [700.0, 1500.0, 3000.0])
def test_no_other_division_of_the_bytes_loses_less(view_bytes: float) -> None:
    curves = {"l2": curve(4096), "l3": curve(1024), "l4": curve(256)}
    errors = divide(curves, view_bytes)
    assert errors is not None
    assert sum(curves[name].size_of(error) for name, error in errors.items()) <= view_bytes
    tried = np.exp(np.linspace(np.log(CURVE_ERRORS[0]), np.log(CURVE_ERRORS[-1]), 60))
    sizes = [np.array([of.size_of(error) for error in tried]) for of in curves.values()]
    fits = sizes[0][:, None, None] + sizes[1][:, None] + sizes[2] <= view_bytes
    least = (tried[:, None, None] + tried[:, None] + tried)[fits].min()
    assert sum(errors.values()) <= 1.02 * least  # whose grid is coarser


def test_levels_lose_in_proportion_to_their_numbers_where_none_is_at_an_end() -> None:
    errors = divide({"l2": curve(1024), "l3": curve(512)}, 300.0)
    assert errors is not None
    assert errors["l2"] / errors["l3"] == pytest.approx(2, rel=0.05)  # of Gaussian numbers the slope is cells / error


def test_too_few_bytes_are_none_and_many_lose_nothing_more() -> None:
    curves = {"l2": curve(1024)}
    assert divide(curves, 1.0) is None
    assert divide(curves, 1e9) == {"l2": pytest.approx(CURVE_ERRORS[0])}
