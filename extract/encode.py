"""From stored images to feature levels: the pure core that extraction, recompute and live encoding share.

The result of a row depends on the recipe, its key and its image; never on which rows stand beside it, which worker
runs it, or whether its batch was full: short batches are padded to the recipe's batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.base import Encoder, LatentEncoder, Teacher, TeacherSpec
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.schema import ComputeRecipe, LevelSpec, Recipe, ViewSpec

RowNoise = Mapping[str, NDArray[np.float32]]  # stream -> [K, *shape], one entry per distinct draw


def configure_torch(compute: ComputeRecipe) -> None:
    """Fix what floating point depends on in this process: threads, and no kernel chosen by timing or of lower precision."""
    torch.set_num_threads(compute.threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def distinct_draws(views: Sequence[ViewSpec]) -> tuple[int, ...]:
    """Noise draws that the views use, ascending; views that share a draw share its noise."""
    return tuple(sorted({view.draw for view in views}))


def row_noise(seed: int, key: str, views: Sequence[ViewSpec], spec: TeacherSpec, image_px: tuple[int, int]) -> RowNoise:
    """All noise that one sample needs.

    Shapes: {stream: [K, *shape]} float32, K distinct draws in ascending order.
    """
    return {
        stream: np.stack(
            [draw_noise(seed, key, draw, stream, _noise_shape(shape, image_px)) for draw in distinct_draws(views)]
        )
        for stream, shape in spec.noise_shapes.items()
    }


def _noise_shape(shape: tuple[int, ...], image_px: tuple[int, int]) -> tuple[int, ...]:
    """A spec's shape with a trailing -n, -n replaced by an n-th of the image's height and width."""
    return (*shape[:-2], *(px // -size if size < 0 else size for px, size in zip(image_px, shape[-2:], strict=False)))


def encode_batch(
    teacher: Teacher,
    images: NDArray[np.uint8],
    noise: Mapping[str, NDArray[np.float32]],
    latents: Mapping[bool, NDArray[np.generic]] | None = None,
    *,
    levels: Sequence[LevelSpec],
    views: Sequence[ViewSpec],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Features of one batch, all views; from `latents` of the images where there are any.

    Shapes: images [B, H, W, 3] uint8, noise {stream: [B, K, *shape]}, latents {flip: [B, C, h, w]} -> {level: (B, V, C, h, w)} on
    the device.
    Raises: ShapeError when the teacher's features are not what the recipe says.
    """
    on_device = {stream: torch.from_numpy(each).to(device) for stream, each in noise.items()}
    start = {flip: torch.from_numpy(each).to(device) for flip, each in (latents or {}).items()}
    return encode_on_device(teacher, torch.from_numpy(images).to(device), on_device, start, levels=levels, views=views)


def encode_on_device(
    teacher: Teacher,
    images: Tensor,
    noise: Mapping[str, Tensor],
    latents: Mapping[bool, Tensor] | None = None,
    *,
    levels: Sequence[LevelSpec],
    views: Sequence[ViewSpec],
) -> dict[str, Tensor]:
    """As `encode_batch`, of tensors that are on the device already.

    Shapes: images (B, H, W, 3) uint8, noise {stream: (B, K, *shape)}, latents {flip: (B, C, h, w)} -> {level: (B, V, C, h, w)}.
    """
    draws = distinct_draws(views)
    draw_of_view = torch.tensor([draws.index(view.draw) for view in views], device=images.device)
    pixels = images.permute(0, 3, 1, 2)  # (B, 3, H, W)
    with torch.inference_mode():
        view_noise = {stream: each.index_select(1, draw_of_view) for stream, each in noise.items()}
        if latents:
            assert isinstance(teacher, LatentEncoder)
            features = teacher.encode_from_latents(latents, view_noise, views)
        else:
            assert isinstance(teacher, Encoder)
            features = teacher.encode(pixels.float() / 127.5 - 1.0, view_noise, views)
    level_of_tap = {level.tap: level.name for level in teacher.spec.levels}
    encoded = {level.name: features[level_of_tap[level.tap]] for level in levels}
    for level in levels:
        check_shape(encoded[level.name], level, (len(images), len(views)))
    return encoded


def check_shape(features: Tensor, level: LevelSpec, leading: tuple[int, int]) -> None:
    """The teacher must give the recipe's shape, or everything stored would be mislabelled."""
    expected = (*leading, level.channels, level.height, level.width)
    if tuple(features.shape) != expected:
        raise ShapeError(
            f"level {level.name} (tap {level.tap}) came out of the teacher as {tuple(features.shape)}, the recipe says {expected}; "
            f"check extract.transform.px and extract.teacher.taps"
        )


def pad_batch(array: NDArray[np.uint8], batch_size: int) -> NDArray[np.uint8]:
    """Images with zero rows appended up to the batch size. Shapes: [n, ...] -> [batch_size, ...], n <= batch_size."""
    missing = batch_size - len(array)
    if missing <= 0:
        return array
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def encode_rows(
    teacher: Teacher,
    recipe: Recipe,
    images: NDArray[np.uint8],
    keys: Sequence[str],
    *,
    views: Sequence[ViewSpec] | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Features of stored images, computed as extraction does; `views` may ask for draws that were not stored.

    Shapes: images [N, H, W, 3] uint8 -> {level: (N, V, C, h, w)} on the device, in the teacher's output dtype.
    """
    views = recipe.views if views is None else views
    if recipe.synthesized:
        return _synthesized_rows(teacher, recipe, keys, views, device)
    size = recipe.compute.batch_size
    parts: dict[str, list[Tensor]] = {level.name: [] for level in recipe.levels}
    for start in range(0, len(keys), size):
        rows = slice(start, start + size)
        noise = [row_noise(recipe.noise_seed, key, views, teacher.spec, images.shape[1:3]) for key in keys[rows]]
        padded = pad_batch(images[rows], size)
        encoded = encode_batch(
            teacher, padded, stack_noise(noise, teacher.spec, size), levels=recipe.levels, views=views, device=device
        )
        for name, features in encoded.items():
            parts[name].append(features[: len(noise)])
    return {name: torch.cat(features) for name, features in parts.items()}


def _synthesized_rows(
    teacher: Teacher, recipe: Recipe, keys: Sequence[str], views: Sequence[ViewSpec], device: str
) -> dict[str, Tensor]:
    """Features of a synthesized dataset follow from its keys; another view of the same image there is none."""
    from dtpipe.extract.synthesize import synthesize_rows

    if tuple(views) != recipe.views:
        raise ConfigError(
            "the dataset is synthesized: its images have no other noise draws or flips, so nothing can be encoded again"
        )
    return synthesize_rows(teacher, recipe, keys, device)[1]


def stack_noise(noise: Sequence[RowNoise | None], spec: TeacherSpec, batch_size: int) -> dict[str, NDArray[np.float32]]:
    """Noise of a batch, zeros for rows without any (bad images) and for padding.

    Shapes: per row {stream: [K, *shape]} -> {stream: [batch_size, K, *shape]}.
    """
    present = next((each for each in noise if each is not None), None)
    if present is None:
        return {}
    stacked = {}
    for stream in spec.noise_shapes:
        out = np.zeros((batch_size, *present[stream].shape), np.float32)
        for idx, each in enumerate(noise):
            if each is not None:
                out[idx] = each[stream]
        stacked[stream] = out
    return stacked
