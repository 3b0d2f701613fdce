"""Targets that follow their image to another size: masks by nearest neighbour, boxes by the same scale and crop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dtpipe.extract.sources.layouts.mask_files import resize_mask
from dtpipe.manifests.labels import Class, Instances, Mask, Target
from dtpipe.manifests.schema import TransformRecipe


def resize_target(target: Target, recipe: TransformRecipe) -> Target:
    """The target as `resize_image` resizes its image.

    Objects of which nothing is left in a crop are left out, and areas are those of what is left.
    """
    if isinstance(target, Class):
        return target
    if isinstance(target, Mask):
        return replace(target, numbers=resize_mask(target.numbers, recipe))
    if isinstance(target, Instances):
        return _resize_objects(target, recipe)
    return replace(target, segments=resize_mask(target.segments, recipe))


def _resize_objects(objects: Instances, recipe: TransformRecipe) -> Instances:
    height, width = recipe.height, recipe.width
    scales = np.array([width / objects.size_px[1], height / objects.size_px[0]])
    offset = np.zeros(2)
    if recipe.resize == "center_crop":
        covered = np.round(np.array(objects.size_px[::-1]) * scales.max())
        scales = covered / objects.size_px[::-1]
        offset = (covered - [width, height]) // 2
    edges = [width, height] * 2
    boxes = np.clip(objects.boxes * np.tile(scales, 2) - np.tile(offset, 2), 0, edges)
    left = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1))
    masks = objects.masks
    if masks is not None:
        resized = [resize_mask(masks[idx].view(np.uint8), recipe) for idx in left]
        masks = np.array(resized, dtype=bool).reshape(len(left), height, width)
    crowd = None if objects.crowd is None else objects.crowd[left]
    return Instances((height, width), boxes[left], objects.classes[left], masks, crowd)
