"""How far features computed in low precision are from float32: measured once per dataset, on its own first images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.codecs.coded import CodedLevels
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.schema import IMAGE, Recipe

NUM_COMPARED = 8


def float32_error(
    config: TeacherConfig, recipe: Recipe, arrays: ShardArrays, codecs: Mapping[str, LevelCodec], device: str
) -> Mapping[str, float]:
    """By level: largest difference of a shard's first features to those of the same teacher in float32, over the
    largest of these.

    Loads the teacher a second time, in float32, for as long as this takes. Empty without good samples, or where images
    are not stored.
    """
    good = [idx for idx, row in enumerate(arrays.rows) if row.status == "ok"][:NUM_COMPARED]
    if not good or recipe.images != "stored":
        return {}
    chosen = {name: values[good] for name, values in arrays.arrays.items()}
    stored = CodedLevels.of_arrays(len(good), codecs, chosen).decode()
    keys = [arrays.rows[idx].key for idx in good]
    teacher = load_teacher(config.model_copy(update={"dtype": "float32"}), device)
    images = chosen[IMAGE].astype(np.uint8, copy=False)
    exact = encode(teacher, recipe_rows(recipe, teacher.spec, keys, images), device, recipe.compute).levels
    errors = {}
    for name, features in exact.items():
        reference = features.cpu().double().numpy()
        largest = float(np.abs(reference).max()) or 1.0
        errors[name] = float(np.abs(stored[name].astype(np.float64) - reference).max()) / largest
    return errors
