"""A synthesized dataset: keys to images and features, through a teacher that makes its own images.

Sample i has the key `z/000000042`; its latent, class and noise maps are functions of (seed, key), so a row depends on
nothing else, and the same recipe gives the same dataset wherever it runs. Source: DreamTeacher, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.extract.encode import check_shape, row_noise, stack_noise
from dtpipe.extract.teachers.base import Generator, Teacher
from dtpipe.manifests.schema import Recipe

ONE_VIEW = 1  # another draw would be another image, and its features are known as made only


def synthesize_batch(
    teacher: Teacher, recipe: Recipe, noise: Mapping[str, NDArray[np.float32]], device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and features of one batch; a row whose image is not finite gets features that are not, so that it is marked bad.

    Shapes: noise {stream: [B, 1, *shape]} -> (B, H, W, 3) uint8, {level: (B, 1, C, h, w)}, on the device.
    Raises: ShapeError when the teacher gives other shapes than the recipe says.
    """
    return synthesize_on_device(
        teacher, recipe, {stream: torch.from_numpy(each).to(device) for stream, each in noise.items()}
    )


def synthesize_on_device(
    teacher: Teacher, recipe: Recipe, noise: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `synthesize_batch`, of noise that is on the device already. Shapes: noise {stream: (B, 1, *shape)} -> the same."""
    assert isinstance(teacher, Generator)
    with torch.inference_mode():
        images, features = teacher.synthesize({stream: each[:, 0] for stream, each in noise.items()})
        level_of_tap = {level.tap: level.name for level in teacher.spec.levels}
        broken = ~torch.isfinite(images).flatten(1).all(dim=1)
        made = {level.name: features[level_of_tap[level.tap]].unsqueeze(1) for level in recipe.levels}
        for level in recipe.levels:
            check_shape(made[level.name], level, (len(images), ONE_VIEW))
            made[level.name][broken] = float("nan")
        pixels = images.float().nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1), made


def synthesize_rows(
    teacher: Teacher, recipe: Recipe, keys: Sequence[str], device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and features of some keys, computed as extraction does.

    Shapes: -> (N, H, W, 3) uint8, {level: (N, 1, C, h, w)}, on the device.
    """
    size, spec = recipe.compute.batch_size, teacher.spec
    image_px = (recipe.transform.height, recipe.transform.width)
    images: list[Tensor] = []
    levels: dict[str, list[Tensor]] = {level.name: [] for level in recipe.levels}
    for start in range(0, len(keys), size):
        noise = [row_noise(recipe.noise_seed, key, recipe.views, spec, image_px) for key in keys[start : start + size]]
        pixels, made = synthesize_batch(teacher, recipe, stack_noise(noise, spec, size), device)
        images.append(pixels[: len(noise)])
        for name, features in made.items():
            levels[name].append(features[: len(noise)])
    return torch.cat(images), {name: torch.cat(parts) for name, parts in levels.items()}
