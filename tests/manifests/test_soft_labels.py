"""Names of soft labels, which are those of levels."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from dtpipe.manifests.schema import LevelName
from dtpipe.manifests.soft_labels import interpreter_recipe, soft_label_name


@pytest.mark.parametrize(("stride", "name"), [(1, "l0.labels"), (4, "l2.labels"), (512, "l9.labels")])
def test_soft_labels_are_named_by_their_stride(stride: int, name: str) -> None:
    assert TypeAdapter(LevelName).validate_python(soft_label_name(stride)) == name


def test_the_teacher_of_soft_labels_is_the_interpreter() -> None:
    recipe = interpreter_recipe("0" * 64, ["sky", "sea"], {"dataset": "1" * 64}, num_views=2)
    assert (recipe.kind, recipe.weights_blake3) == ("interpreter", "0" * 64)
    assert recipe.options == {"classes": ["sky", "sea"], "features": {"dataset": "1" * 64}, "num_views": 2}
