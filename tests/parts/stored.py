"""What an extraction stored, for comparisons with what a teacher gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.extract.teachers.base import Teacher
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_images, read_level


def pixels_of(dataset: FeatureDataset, row: int) -> Tensor:
    """A stored image as a teacher takes it. Shapes: -> (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(read_image(dataset, row)).permute(2, 0, 1)[None].float() / 127.5 - 1


def stored_level(dataset: FeatureDataset, name: str, rows: Sequence[int]) -> np.ndarray:
    """A level of some rows in all views. Shapes: -> [N, V, C, h, w]."""
    views = range(len(dataset.views))
    return np.stack([[read_level(dataset, name, row, view) for view in views] for row in rows])


def recomputed(dataset: FeatureDataset, teacher: Teacher, rows: Sequence[int]) -> dict[str, Tensor]:
    """Features of the stored images of some rows once more, in float32. Shapes: -> {level: (N, V, C, h, w)}."""
    keys, recipe = [dataset.columns.keys[row] for row in rows], dataset.recipe
    again = recipe_rows(recipe, teacher.spec, keys, read_images(dataset, rows))
    return dict(encode(teacher, again, "cpu", recipe.compute).levels)
