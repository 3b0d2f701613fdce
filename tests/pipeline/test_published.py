"""Every published layout as tasks take it: whole, and resized for frozen ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtpipe.manifests.labels import Class, Instances, Mask, Panoptic
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.labelled import LabelledReader, open_labelled
from parts.images import write_files
from parts.published_trees import TREES


@pytest.mark.parametrize("name", sorted(TREES))
@pytest.mark.parametrize("recipe", [None, TransformRecipe(height=16, width=16)])
def test_targets_lie_on_their_images_whole_and_resized(
    name: str, recipe: TransformRecipe | None, tmp_path: Path
) -> None:
    make, root, split = TREES[name]
    place = f"{name}:{write_files(tmp_path / root, make())}@{split}"
    source = open_labelled(place)
    labelled = LabelledReader(source, recipe, place).select(range(len(source.items)), print)
    assert len(labelled) == len(source.items) and len(set(labelled.digests)) == len(labelled)
    assert labelled.find_classes() <= set(range(len(labelled.classes)))
    for row in range(len(labelled)):
        image, target = labelled.image(row), labelled.target(row)
        assert isinstance(target, labelled.kind)
        if isinstance(target, Mask):
            assert target.numbers.shape == image.shape[:2] == ((16, 16) if recipe else source_px(name))
            assert source.kind in (Mask, Instances) and target.known.any()
        elif isinstance(target, Instances):
            assert target.masks is not None and target.masks.shape == (len(target), *image.shape[:2])
        elif isinstance(target, Panoptic) and recipe is None:
            assert target.segments.shape == image.shape[:2]
            assert set(np.unique(target.segments).tolist()) - {0} == set(target.classes)
        else:
            assert isinstance(target, Class | Panoptic)


def source_px(name: str) -> tuple[int, int]:
    return (8, 8) if name == "ddpm-seg" else (8, 12)
