"""From samples to feature levels: the one place where a teacher is run, for extraction, recompute, live encoding and
reports.

States of the data: an image is uint8 (B, H, W, 3), as stored, until it is scaled to [-1, 1] here; noise is drawn per
sample on the host; features come out at the teacher's resolutions and in its dtype, on its device.

The result of a row depends on the recipe, its key and its image; never on which rows stand beside it, which worker runs
it, or whether its batch was full: short batches are padded to the recipe's batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.extract.latents import Latents
from dtpipe.extract.noise import RowNoise, distinct_draws, row_noise
from dtpipe.extract.pixels import from_pixels, to_pixels
from dtpipe.extract.teachers.arithmetic import exact
from dtpipe.extract.teachers.base import Encoder, Generator, LatentEncoder, Teacher, TeacherSpec
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.schema import ComputeRecipe, LevelSpec, Recipe, ViewSpec


@dataclass(frozen=True)
class Sample:
    """What a teacher needs of one image, on the host: [H, W, 3] uint8, noise by stream, latents by flip."""

    noise: RowNoise
    image: NDArray[np.uint8] | None = None
    latents: Latents = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Samples that go through a teacher together, and what is read of them; tensors on the host or on any device."""

    views: Sequence[ViewSpec]
    noise: Mapping[str, Tensor]
    """{stream: (B, K, *shape)} float32; K distinct draws of the views, ascending."""
    images: Tensor | None = None
    """(B, H, W, 3) uint8, or (B, 3, H, W) float32 in [-1, 1]; None where the teacher makes them."""
    latents: Mapping[bool, Tensor] = field(default_factory=dict)
    """{flip: (B, C, h, w)}, in place of encoding the images, where the teacher can start from them."""
    levels: Sequence[LevelSpec] = ()
    """What is read, under its name in the dataset; empty: all levels of the teacher, under its names."""

    def __len__(self) -> int:
        tensors = self.noise.values() if self.images is None else (self.images,)
        return len(next(iter(tensors)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same rows with each tensor changed."""
        return replace(
            self,
            noise={stream: change(values) for stream, values in self.noise.items()},
            images=None if self.images is None else change(self.images),
            latents={flip: change(values) for flip, values in self.latents.items()},
        )


@dataclass(frozen=True)
class Encoded:
    """What came out."""

    levels: dict[str, Tensor]
    """{level: (B, V, C, h, w)} on the device, in the teacher's output dtype."""
    images: Tensor | None
    """(B, H, W, 3) uint8 as a generator made them, on the device; as they were given for an encoder."""


def encode(teacher: Teacher, rows: Rows, device: torch.device | str, compute: ComputeRecipe | None = None) -> Encoded:
    """Features of rows, all views; for a generator the images it makes, too.

    A row whose image a generator makes not finite gets features that are not, so that it is marked bad.
    `compute`: as a recipe says, in batches of its size, the last one padded, on its number of threads. Without, as it
    comes.
    Raises: ShapeError when the teacher gives other shapes than the rows ask for.
    """
    device = torch.device(device)
    size = compute.batch_size if compute else len(rows)
    with torch.inference_mode(), exact(device, compute.threads if compute else None):
        parts = [_encode_batch(teacher, _batch(rows, start, size), device) for start in range(0, len(rows), size)]
    if len(parts) == 1 and len(rows) == size:
        return parts[0]
    levels = {name: _joined([part.levels[name] for part in parts], len(rows)) for name in parts[0].levels}
    images = [part.images for part in parts if part.images is not None]
    return Encoded(levels, _joined(images, len(rows)) if isinstance(teacher, Generator) else rows.images)


def _batch(rows: Rows, start: int, size: int) -> Rows:
    """Some rows, with zeros up to the batch's size."""

    def cut(values: Tensor) -> Tensor:
        chosen = values[start : start + size]
        missing = size - len(chosen)
        return torch.cat([chosen, chosen.new_zeros(missing, *chosen.shape[1:])]) if missing else chosen

    return rows.map(cut)


def _joined(parts: Sequence[Tensor], num_rows: int) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts)))[:num_rows]


def _encode_batch(teacher: Teacher, rows: Rows, device: torch.device) -> Encoded:
    on_device = rows.map(lambda values: values.to(device, non_blocking=True))
    if isinstance(teacher, Generator):
        return _synthesized(teacher, on_device)
    return Encoded(_named(teacher.spec, _encoded(teacher, on_device), rows), rows.images)


def _encoded(teacher: Encoder, rows: Rows) -> dict[str, Tensor]:
    draws = distinct_draws(rows.views)
    index = torch.tensor([draws.index(view.draw) for view in rows.views])
    noise = {stream: values.index_select(1, index.to(values.device)) for stream, values in rows.noise.items()}
    if rows.latents:
        assert isinstance(teacher, LatentEncoder)
        return teacher.encode_from_latents(rows.latents, noise, rows.views)
    assert rows.images is not None
    images = rows.images if rows.images.is_floating_point() else from_pixels(rows.images)
    return teacher.encode(images, noise, rows.views)


def _synthesized(teacher: Generator, rows: Rows) -> Encoded:
    """One view: another draw would be another image, and its features are known as made only."""
    images, features = teacher.synthesize({stream: values[:, 0] for stream, values in rows.noise.items()})
    levels = _named(teacher.spec, {name: level.unsqueeze(1) for name, level in features.items()}, rows)
    broken = ~torch.isfinite(images).flatten(1).all(dim=1)
    for level in levels.values():
        level[broken] = float("nan")
    return Encoded(levels, to_pixels(images))


def _named(spec: TeacherSpec, features: Mapping[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Features by the names asked for.

    Raises: ShapeError when one has another shape than the rows ask for, or everything stored would be mislabelled.
    """
    if not rows.levels:
        return dict(features)
    name_of_tap = {level.tap: level.name for level in spec.levels}
    named = {level.name: features[name_of_tap[level.tap]] for level in rows.levels}
    for level in rows.levels:
        expected = (len(rows), len(rows.views), level.channels, level.height, level.width)
        if tuple(named[level.name].shape) != expected:
            raise ShapeError(
                f"level {level.name} (tap {level.tap}) came out of the teacher as {tuple(named[level.name].shape)}, "
                f"the recipe says {expected}; check extract.transform.px and extract.teacher.taps"
            )
    return named


def recipe_rows(
    recipe: Recipe,
    spec: TeacherSpec,
    keys: Sequence[str],
    images: NDArray[np.uint8] | None = None,
    views: Sequence[ViewSpec] | None = None,
) -> Rows:
    """Rows of a dataset, with the noise that its recipe gives each key; `views` may ask for draws that were not stored.

    Shapes: images [N, H, W, 3]; they play no part where the teacher makes them.
    Raises: ConfigError for other views of a synthesized dataset, whose features follow from its keys.
    """
    views = recipe.views if views is None else views
    if recipe.synthesized and tuple(views) != recipe.views:
        raise ConfigError(
            "the dataset is synthesized: its images have no other noise draws or flips, so nothing can be encoded again"
        )
    image_px = (recipe.transform.height, recipe.transform.width)
    noise = (row_noise(recipe.noise_seed, key, views, spec.noise_shapes, image_px) for key in keys)
    rows = stack_rows([Sample(streams) for streams in noise], views, recipe.levels)
    return rows if recipe.synthesized or images is None else replace(rows, images=torch.from_numpy(images))


def stack_rows(samples: Sequence[Sample | None], views: Sequence[ViewSpec], levels: Sequence[LevelSpec]) -> Rows:
    """Samples as one batch; one that is missing (a bad image) is zeros, so that a row's place never matters."""
    first = next(sample for sample in samples if sample is not None)

    def stack(get: Callable[[Sample], Any]) -> Tensor:
        stacked = np.zeros((len(samples), *get(first).shape), get(first).dtype)
        for idx, sample in enumerate(samples):
            if sample is not None:
                stacked[idx] = get(sample)
        return torch.from_numpy(stacked)

    return Rows(
        views,
        {stream: stack(lambda sample: sample.noise[stream]) for stream in first.noise},  # noqa: B023  called at once
        None if first.image is None else stack(lambda sample: sample.image),
        {flip: stack(lambda sample: sample.latents[flip]) for flip in first.latents},  # noqa: B023
        levels,
    )
