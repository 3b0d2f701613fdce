"""Fits to samples that are made up: how much memory they take, and what a level without features takes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dtpipe.extract.fitting.base import FitRequest
from dtpipe.extract.fitting.fit import fit_codecs
from dtpipe.extract.fitting.sample import FitSample, fit_memory_bytes
from dtpipe.manifests.codecs.rans_tables import Coder
from dtpipe.manifests.schema import IndexRow, Recipe
from parts import golden


def sample_of(recipe: Recipe, num: int) -> FitSample:
    """White noise."""
    rng = np.random.Generator(np.random.Philox(0))
    shapes = {level.name: (num, level.channels, level.height, level.width) for level in recipe.levels}
    levels = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    images = np.zeros((num, recipe.transform.height, recipe.transform.width, 3), np.uint8)
    return FitSample(tuple(IndexRow(row=row, key=f"{row}", shard=0) for row in range(num)), levels, images)


@pytest.mark.parametrize(("max_error", "budget_bytes"), [(0.001, None), (0.1, None), (None, 10**8)])
def test_a_plan_foretells_the_memory_that_a_fit_takes(max_error: float | None, budget_bytes: int | None) -> None:
    recipe, num = golden.make_recipe(golden.Settings()), 64
    sizes = {"l2": (64, 16, 16), "l3": (120, 8, 8), "l4.b": (8, 4, 4)}
    shapes = {name: dict(zip(("channels", "height", "width"), size, strict=True)) for name, size in sizes.items()}
    recipe = recipe.model_copy(
        update={"levels": tuple(level.model_copy(update=shapes[level.name]) for level in recipe.levels)}
    )
    request = FitRequest(dict.fromkeys(sizes, "transform"), max_error, budget_bytes, num, 0, "rans")
    fit_codecs(recipe, sample_of(recipe, 8), request, num, lambda *_: None)  # compiled code and tables of constants
    tracemalloc.start()
    fit_codecs(recipe, sample_of(recipe, num), request, num, lambda *_: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= fit_memory_bytes(recipe, request, num) <= 2 * peak


@pytest.mark.parametrize("coder", ["zstd", "rans"])
def test_a_dead_level_takes_next_to_nothing_of_a_budget(coder: Coder) -> None:
    recipe, num = golden.make_recipe(golden.Settings()), 16
    sample = sample_of(recipe, num)
    sample.levels["l3"][...] = 2
    request = FitRequest(dict.fromkeys(sample.levels, "transform"), None, 10**6, num, 0, coder)
    result = fit_codecs(recipe, sample, request, num, lambda *_: None)
    assert result.codecs["l3"].parameters["symbols"] == 1 < result.codecs["l2"].parameters["symbols"]
    assert result.expected["l3"]["relative_mse"] == 0
