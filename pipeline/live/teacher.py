"""Teachers as training asks for them (`distill.live`): fresh noise draws of the samples of one dataset or of several.

What is encoded live is what `extract` would store for the same draw, but for the last bits that batches of another size round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.stream.batch import flip_where
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.extract.encode import Rows, Sample, encode, stack_rows
from dtpipe.extract.latents import Latents, StoredLatents
from dtpipe.extract.noise import RowNoise, row_noise
from dtpipe.extract.teachers.base import Teacher
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError, DtpipeError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset, JoinedDataset
from dtpipe.manifests.read.source import FeatureSource
from dtpipe.manifests.schema import ViewSpec
from dtpipe.pipeline.live.recorded import RecipeTeacher, teacher_config
from dtpipe.pipeline.live.source import LiveSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class _Chunk:
    """Samples of one timestep that go through the teacher at once."""

    idxs: NDArray[np.int64]
    """Which of the samples."""
    rows: Rows
    """On the host, without images."""


class RecipeLive:
    """A `LiveTeacher` for the samples of one recipe; fresh draw n is the recipe's draw `num_stored` + n.

    Flipped samples go with the others: their images are flipped before the teacher sees them. Batches are at most the recipe's
    and are not padded, so features of a sample may differ in their last bits with the company that it has.
    """

    def __init__(self, opened: RecipeTeacher, num_stored: int, dataset: FeatureDataset | None = None) -> None:
        """`dataset`: where latents may be kept, which save the teacher its VAE."""
        self.opened, self.num_stored = opened, num_stored
        self.latents = None if dataset is None else StoredLatents.find(dataset, opened.teacher.spec, opened.recipe)
        self.makes_images = opened.recipe.synthesized

    def prepare(self, samples: LiveSamples) -> list[_Chunk]:
        """Draw the noise, in batches of the recipe's size."""
        size = self.opened.recipe.compute.batch_size
        groups: dict[int | None, list[int]] = {}
        for idx, view in enumerate(samples.views):
            groups.setdefault(self.opened.recipe.views[view].timestep, []).append(idx)
        return [
            self._chunk(samples, idxs[start : start + size], timestep)
            for timestep, idxs in groups.items()
            for start in range(0, len(idxs), size)
        ]

    def _chunk(self, samples: LiveSamples, idxs: Sequence[int], timestep: int | None) -> _Chunk:
        latents = self._latents(samples, idxs)
        noises = [
            Sample(self._noise(samples, idx), latents=latents[at] if latents else {}) for at, idx in enumerate(idxs)
        ]
        view = ViewSpec(draw=0, timestep=timestep)  # of the flipped image where the sample is flipped
        rows = stack_rows(noises, [view], self.opened.recipe.levels)
        return _Chunk(np.array(idxs), rows.map(self._on_host))

    def encode(self, images: Tensor, samples: LiveSamples, prepared: list[_Chunk]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LiveTeacher.encode`. Shapes: images (B, H, W, 3) uint8 -> the same, {level: (B, C, h, w)}."""
        import torch

        out: dict[str, Tensor] = {}
        height, width = self.opened.recipe.transform.height, self.opened.recipe.transform.width
        shown = images.new_empty((len(samples), height, width, 3)) if self.makes_images else images
        for chunk in prepared:
            idxs = torch.from_numpy(chunk.idxs).to(images.device)
            rows = chunk.rows if self.makes_images else replace(chunk.rows, images=_seen(images, samples, chunk))
            encoded = encode(self.opened.teacher, rows, images.device)
            if self.makes_images:
                assert encoded.images is not None
                shown[idxs] = encoded.images
            for name, features in encoded.levels.items():
                if name not in out:
                    out[name] = features.new_empty((len(samples), *features.shape[2:]))
                out[name][idxs] = features[:, 0]
        return shown, out

    def _noise(self, samples: LiveSamples, idx: int) -> RowNoise:
        recipe, spec = self.opened.recipe, self.opened.teacher.spec
        image_px = (recipe.transform.height, recipe.transform.width)
        view = ViewSpec(draw=self.num_stored + int(samples.fresh[idx]))
        return row_noise(recipe.noise_seed, samples.keys[idx], [view], spec.noise_shapes, image_px)

    def _latents(self, samples: LiveSamples, idxs: Sequence[int]) -> list[Latents]:
        """Of each image, or of its mirror image, as if that were the image; empty where one of them is not kept."""
        stored = self.latents
        if stored is None or not {bool(samples.flip[idx]) for idx in idxs} <= stored.view_of_flip.keys():
            return []
        rows = [stored.dataset.columns.row_of(samples.keys[idx]) for idx in idxs]
        return [{False: stored.read([row], bool(samples.flip[idx]))[0]} for row, idx in zip(rows, idxs, strict=True)]

    def _on_host(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.opened.device == "cuda" else tensor


def _seen(images: Tensor, samples: LiveSamples, chunk: _Chunk) -> Tensor:
    """The images of a chunk as the teacher sees them. Shapes: -> (n, H, W, 3) uint8."""
    import torch

    flip = torch.from_numpy(samples.flip[chunk.idxs]).to(images.device)
    return flip_where(images[torch.from_numpy(chunk.idxs).to(images.device)], flip)


class ConcatLive:
    """A `LiveTeacher` for datasets one after the other: each sample by the recipe of its own."""

    def __init__(self, source: ConcatDataset, parts: Sequence[RecipeLive]) -> None:
        self._source, self._parts = source, parts
        self.makes_images = parts[0].makes_images  # datasets of two teachers do not concatenate

    def prepare(self, samples: LiveSamples) -> list[tuple[int, NDArray[np.int64], Any]]:
        """Samples by dataset, each prepared by its own."""
        part_of = self._source.part_of([self._source.columns.row_of(key) for key in samples.keys])
        chosen = {part: np.flatnonzero(part_of == part) for part in sorted(set(part_of.tolist()))}
        return [(part, rows, self._parts[part].prepare(samples.take(rows))) for part, rows in chosen.items()]

    def encode(
        self, images: Tensor, samples: LiveSamples, prepared: list[tuple[int, NDArray[np.int64], Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LiveTeacher.encode`."""
        import torch

        made: dict[str, Tensor] = {}
        for part, chosen, inner in prepared:
            rows = torch.from_numpy(chosen).to(images.device)
            shown, levels = self._parts[part].encode(images[rows], samples.take(chosen), inner)
            for name, values in {"": shown, **levels}.items():
                whole = made.setdefault(
                    name, torch.empty((len(samples), *values.shape[1:]), dtype=values.dtype, device=images.device)
                )
                whole[rows] = values
        return made.pop(""), made


class JoinedLive:
    """A `LiveTeacher` for joined datasets: each gives its own levels, at its own view."""

    makes_images = False

    def __init__(self, source: JoinedDataset, parts: Sequence[RecipeLive]) -> None:
        """Raises: ConfigError for synthesized datasets, whose images would no longer be those of the other datasets."""
        if made := [part.url for part, live in zip(source.parts, parts, strict=True) if live.makes_images]:
            raise ConfigError(
                f"{made[0]} is synthesized, and a new image has no features in the datasets joined to it; set --reencode 0"
            )
        self._parts = parts
        self._view_of = {(place.part, view): place.view for (_, view), place in source.places.items()}
        self._name_of = {(place.part, place.level): name for (name, _), place in source.places.items()}

    def prepare(self, samples: LiveSamples) -> list[tuple[int, LiveSamples, NDArray[np.int64], Any]]:
        """For each dataset, the samples it has levels for, at its own views."""
        found = []
        for part, live in enumerate(self._parts):
            chosen = np.array(
                [idx for idx, view in enumerate(samples.views) if (part, int(view)) in self._view_of], np.int64
            )
            if len(chosen):
                views = np.array([self._view_of[part, int(samples.views[idx])] for idx in chosen], np.int64)
                taken = samples.take(chosen)
                inner = LiveSamples(taken.keys, views, taken.flip, taken.fresh)
                found.append((part, inner, chosen, live.prepare(inner)))
        return found

    def encode(
        self, images: Tensor, samples: LiveSamples, prepared: list[tuple[int, LiveSamples, NDArray[np.int64], Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LiveTeacher.encode`."""
        import torch

        out: dict[str, Tensor] = {}
        for part, inner, chosen, given in prepared:
            rows = torch.from_numpy(chosen).to(images.device)
            _, levels = self._parts[part].encode(images[rows], inner, given)
            for level, values in levels.items():
                name = self._name_of[part, level]
                whole = out.setdefault(
                    name, torch.empty((len(samples), *values.shape[1:]), dtype=values.dtype, device=images.device)
                )
                whole[rows] = values
        return images, out


def open_live(given: Mapping[str, Any], source: FeatureSource, device: torch.device) -> LiveTeacher:
    """The live teacher of a source: each dataset's own, with `given` settings in place of those that its extraction recorded.

    Raises: TeacherError or ConfigError saying what differs, when a dataset's teacher cannot be had.
    """
    if isinstance(source, LiveSource):
        return RecipeLive(source.teacher, num_stored=0)
    parts = list(source.parts) if isinstance(source, JoinedDataset | ConcatDataset) else [source]
    datasets = [part for part in parts if isinstance(part, FeatureDataset)]
    assert len(datasets) == len(parts), "a live teacher needs datasets with a recipe"
    opened = _open_each(datasets, given, device)
    live = [
        RecipeLive(each, 1 + max(view.draw for view in each.recipe.views), dataset)
        for each, dataset in zip(opened, datasets, strict=True)
    ]
    if isinstance(source, JoinedDataset):
        return JoinedLive(source, live)
    return ConcatLive(source, live) if isinstance(source, ConcatDataset) else live[0]


def _open_each(
    datasets: Sequence[FeatureDataset], given: Mapping[str, Any], device: torch.device
) -> list[RecipeTeacher]:
    """Each dataset's teacher, loaded once however many datasets it made; `given` may be that of some of several."""
    loaded: dict[str, Teacher] = {}
    several = len({dataset.recipe.teacher.weights_blake3 for dataset in datasets}) > 1

    def open_as(dataset: FeatureDataset, settings: Mapping[str, Any]) -> RecipeTeacher:
        try:
            config = teacher_config(dataset.plan, settings)
            name = config.model_dump_json()
            if name not in loaded:
                loaded[name] = load_teacher(config, device.type)
            return RecipeTeacher(dataset.recipe, config, device.type, teacher=loaded[name])
        except DtpipeError as err:
            raise type(err)(f"{dataset.url} cannot be encoded live: {err}") from err

    opened: list[RecipeTeacher] = []
    refused: list[DtpipeError] = []
    for dataset in datasets:
        try:
            opened.append(open_as(dataset, given))
        except DtpipeError as err:
            if not (several and given):
                raise
            refused.append(err)
            opened.append(open_as(dataset, {}))
    if len(refused) == len(datasets):
        raise TeacherError(f"--teacher is that of none of the datasets: {refused[0]}")
    return opened
