"""Teachers as training asks for them (`distill.live`): fresh noise draws of the samples of one dataset or of several.

What is encoded live is what `extract` would store for the same draw, but for the last bits that batches of another size round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.stream.batch import flip_where
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.extract.encode import encode_on_device, row_noise, stack_noise
from dtpipe.extract.latents import StoredLatents
from dtpipe.extract.synthesize import synthesize_on_device
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

    rows: NDArray[np.int64]
    timestep: int | None
    noise: Mapping[str, Tensor]
    """{stream: (n, 1, *shape)} on the host."""
    latents: Tensor | None
    """(n, C, h, w) on the host where the dataset keeps latents."""


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
            self._chunk(samples, rows[start : start + size], timestep)
            for timestep, rows in groups.items()
            for start in range(0, len(rows), size)
        ]

    def _chunk(self, samples: LiveSamples, rows: Sequence[int], timestep: int | None) -> _Chunk:
        return _Chunk(np.array(rows), timestep, self._noise(samples, rows), self._latents(samples, rows))

    def encode(self, images: Tensor, samples: LiveSamples, prepared: list[_Chunk]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LiveTeacher.encode`. Shapes: images (B, H, W, 3) uint8 -> the same, {level: (B, C, h, w)}."""
        import torch

        out: dict[str, Tensor] = {}
        height, width = self.opened.recipe.transform.height, self.opened.recipe.transform.width
        made = images.new_empty((len(samples), height, width, 3)) if self.makes_images else images
        with _exact_arithmetic(images.device):
            for chunk in prepared:
                rows = torch.from_numpy(chunk.rows).to(images.device)
                pixels, levels = self._encode_chunk(images, samples, chunk)
                if self.makes_images:
                    made[rows] = pixels
                for name, features in levels.items():
                    whole = out.setdefault(
                        name,
                        torch.empty((len(samples), *features.shape[2:]), dtype=features.dtype, device=images.device),
                    )
                    whole[rows] = features[:, 0]
        return made, out

    def _encode_chunk(self, images: Tensor, samples: LiveSamples, chunk: _Chunk) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (n, H, W, 3) as the teacher saw or made them, {level: (n, 1, C, h, w)}."""
        import torch

        recipe, teacher = self.opened.recipe, self.opened.teacher
        noise = {stream: each.to(images.device, non_blocking=True) for stream, each in chunk.noise.items()}
        if recipe.synthesized:
            return synthesize_on_device(teacher, recipe, noise)
        flip = torch.from_numpy(samples.flip[chunk.rows]).to(images.device)
        seen = flip_where(images[torch.from_numpy(chunk.rows).to(images.device)], flip)
        view = ViewSpec(draw=0, timestep=chunk.timestep)  # of the flipped image where `flip` says so
        latents = None if chunk.latents is None else {False: chunk.latents.to(images.device, non_blocking=True)}
        return seen, encode_on_device(teacher, seen, noise, latents, levels=recipe.levels, views=[view])

    def _noise(self, samples: LiveSamples, rows: Sequence[int]) -> dict[str, Tensor]:
        recipe, spec = self.opened.recipe, self.opened.teacher.spec
        image_px = (recipe.transform.height, recipe.transform.width)
        draws = [[ViewSpec(draw=self.num_stored + int(samples.fresh[idx]))] for idx in rows]
        noise = [
            row_noise(recipe.noise_seed, samples.keys[idx], draw, spec, image_px)
            for idx, draw in zip(rows, draws, strict=True)
        ]
        return {stream: self._on_host(each) for stream, each in stack_noise(noise, spec, len(rows)).items()}

    def _latents(self, samples: LiveSamples, rows: Sequence[int]) -> Tensor | None:
        """Of each image, or of its mirror image; None where one of them is not kept."""
        stored = self.latents
        if stored is None or not {bool(samples.flip[idx]) for idx in rows} <= stored.view_of_flip.keys():
            return None
        columns = stored.dataset.columns
        latents = [stored.read([columns.row_of(samples.keys[idx])], bool(samples.flip[idx]))[0] for idx in rows]
        return self._on_host(np.stack(latents))

    def _on_host(self, values: NDArray[np.generic]) -> Tensor:
        import torch

        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.opened.device == "cuda" else tensor


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


@contextmanager
def _exact_arithmetic(device: torch.device) -> Iterator[None]:
    """On a GPU, the arithmetic of extraction, whatever training has chosen for itself."""
    import torch

    if device.type != "cuda":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
