"""Teachers as training asks for them (`distill.stream.live`): fresh noise draws of samples of one or several datasets.

What is encoded live is what `extract` would store for the same draw, but for last bits that depend on the batch's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.config import DistillRecipeConfig
from dtpipe.distill.labels.targets import soft_label_level
from dtpipe.distill.stream.batch import flip_where
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.trainer import SMALLER
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.encode import Rows, Sample, encode, stack_rows
from dtpipe.extract.latents import Latents, StoredLatents
from dtpipe.extract.noise import RowNoise, row_noise
from dtpipe.extract.teachers.base import Teacher
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.errors import ConfigError, DtpipeError, TeacherError, saying_what_to_lower
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset, JoinedDataset
from dtpipe.manifests.read.source import FeatureSource
from dtpipe.manifests.schema import LevelSpec, ViewSpec
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.pipeline.live.codecs import as_stored
from dtpipe.pipeline.live.labels import behind_dataset
from dtpipe.pipeline.live.recorded import RecipeTeacher, open_teacher

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Indices = NDArray[np.int64]
Route = Callable[[LiveSamples], Iterator[tuple[int, Indices, Indices]]]
"""Which part encodes which samples: a part, indices of its samples, and the view of each on that part's own V axis."""


@dataclass(frozen=True)
class LivePart:
    """The teacher of one recipe, for the samples or levels of a source that are of this recipe."""

    opened: RecipeTeacher
    levels: Sequence[LevelSpec]
    """The recipe's, under their names in the source."""
    num_stored: int = 0
    """Draws that are stored: fresh draw n is the recipe's draw `num_stored` + n."""
    latents: StoredLatents | None = None
    """Kept latents, which save the teacher its VAE."""
    codecs: Mapping[str, LevelCodec] = field(default_factory=dict)
    """Of the levels, by their names in the source, where live features are to be as stored ones."""

    def rows(self, samples: LiveSamples, timestep: int | None) -> Rows:
        """Noise, and latents where they are kept, of samples of one timestep; on the host, without images."""
        latents = self._latents(samples)
        drawn = [
            Sample(self._noise(key, fresh), latents=kept)
            for key, fresh, kept in zip(samples.keys, samples.fresh, latents, strict=True)
        ]
        view = ViewSpec(draw=0, timestep=timestep)  # of the flipped image where the sample is flipped
        return stack_rows(drawn, [view], self.levels).map(self._on_host)

    def _noise(self, key: str, fresh: int) -> RowNoise:
        recipe, spec = self.opened.recipe, self.opened.teacher.spec
        image_px = (recipe.transform.height, recipe.transform.width)
        return row_noise(
            recipe.noise_seed, key, [ViewSpec(draw=self.num_stored + int(fresh))], spec.noise_shapes, image_px
        )

    def _latents(self, samples: LiveSamples) -> list[Latents]:
        """Of each image, or of its mirror image, as if that were the image; empty where one of them is not kept."""
        stored = self.latents
        if stored is None or not set(samples.flip.tolist()) <= stored.view_of_flip.keys():
            return [{}] * len(samples)
        rows = [stored.dataset.columns.row_of(key) for key in samples.keys]
        return [{False: stored.read([row], bool(flip))[0]} for row, flip in zip(rows, samples.flip, strict=True)]

    def _on_host(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.opened.device == "cuda" else tensor


@dataclass(frozen=True)
class _Chunk:
    """Samples of one timestep that go through one teacher at once."""

    part: LivePart
    idxs: Indices
    """Which of the samples."""
    rows: Rows
    """On the host, without images."""


@dataclass(frozen=True)
class LiveRecipes:
    """A `LiveTeacher` for samples of one recipe or of several.

    Flipped samples go with the others: their images are flipped before the teacher sees them. Batches are at most the
    recipe's and are not padded, so features of a sample may differ in their last bits with the company that it has.
    """

    parts: Sequence[LivePart]
    route: Route

    @property
    def makes_images(self) -> bool:
        """As `LiveTeacher`: datasets of two teachers do not concatenate, and synthesized ones do not join."""
        return self.parts[0].opened.recipe.synthesized

    def prepare(self, samples: LiveSamples) -> list[_Chunk]:
        """Draw the noise, in batches of the recipe's size."""
        return [
            _Chunk(part, idxs, part.rows(samples.take(idxs), timestep))
            for part_idx, chosen, views in self.route(samples)
            for part in (self.parts[part_idx],)
            for timestep, idxs in _batches(part, chosen, views)
        ]

    def encode(
        self, images: Tensor, samples: LiveSamples, prepared: Sequence[_Chunk]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `LiveTeacher.encode`. Shapes: images (B, H, W, 3) uint8 -> the same, {level: (B, C, h, w)}."""
        import torch

        levels: dict[str, Tensor] = {}
        flip = torch.from_numpy(samples.flip).to(images.device)
        shown = self._empty_images(images, len(samples)) if self.makes_images else images
        for chunk in prepared:
            idxs = torch.from_numpy(chunk.idxs).to(images.device)
            seen = None if self.makes_images else flip_where(images[idxs], flip[idxs])
            with saying_what_to_lower("encoding live", images.device.type, len(idxs), SMALLER):
                encoded = encode(chunk.part.opened.teacher, replace(chunk.rows, images=seen), images.device)
            if self.makes_images:
                assert encoded.images is not None
                shown[idxs] = encoded.images
            for name, raw in encoded.levels.items():
                codec = chunk.part.codecs.get(name)
                features = raw if codec is None else as_stored(codec, raw)
                if name not in levels:
                    levels[name] = features.new_empty((len(samples), *features.shape[2:]))
                levels[name][idxs] = features[:, 0]
        return shown, levels

    def _empty_images(self, images: Tensor, num: int) -> Tensor:
        transform = self.parts[0].opened.recipe.transform
        return images.new_empty((num, transform.height, transform.width, 3))


def _batches(part: LivePart, chosen: Indices, views: Indices) -> Iterator[tuple[int | None, Indices]]:
    """Samples of one timestep each, in batches of the recipe's size."""
    recipe = part.opened.recipe
    by_timestep: dict[int | None, list[int]] = {}
    for idx, view in zip(chosen.tolist(), views.tolist(), strict=True):
        by_timestep.setdefault(recipe.views[view].timestep, []).append(idx)
    size = recipe.compute.batch_size
    for timestep, idxs in by_timestep.items():
        for start in range(0, len(idxs), size):
            yield timestep, np.array(idxs[start : start + size], np.int64)


def route_to_one(samples: LiveSamples) -> Iterator[tuple[int, Indices, Indices]]:
    """All samples are of one recipe."""
    yield 0, np.arange(len(samples)), samples.views


def _route_by_row(source: ConcatDataset) -> Route:
    """Each sample is of the dataset that has its row."""

    def route(samples: LiveSamples) -> Iterator[tuple[int, Indices, Indices]]:
        part_of = source.part_of([source.columns.row_of(key) for key in samples.keys])
        for part in np.unique(part_of).tolist():
            chosen = np.flatnonzero(part_of == part)
            yield part, chosen, samples.views[chosen]

    return route


def _route_by_view(source: JoinedDataset, kept: Sequence[int]) -> Route:
    """Each dataset of those kept gives its own levels, of the samples at a view that it has."""
    view_of = {(place.part, view): place.view for (_, view), place in source.places.items()}

    def route(samples: LiveSamples) -> Iterator[tuple[int, Indices, Indices]]:
        for place, part in enumerate(kept):
            chosen = np.array([idx for idx, view in enumerate(samples.views) if (part, view) in view_of], np.int64)
            yield place, chosen, np.array([view_of[part, view] for view in samples.views[chosen]], np.int64)

    return route


def open_live(
    settings: Mapping[str, Any],
    source: FeatureSource,
    device: torch.device,
    config: DistillRecipeConfig | None = None,
) -> LiveTeacher:
    """The live teacher of a source: each dataset's own, with `settings` in place of those that its extraction recorded;
    behind it the interpreter of the soft labels that `config` learns from.

    Raises: TeacherError or ConfigError saying what differs, when a dataset's teacher or interpreter cannot be had.
    """
    datasets, route, names = _composition(source)
    parts = []
    for idx, opened in enumerate(_open_each(datasets, settings, device.type)):
        recipe = opened.recipe
        levels = [
            level.model_copy(update={"name": names.get((idx, level.name), level.name)}) for level in recipe.levels
        ]
        latents = StoredLatents.find(datasets[idx], opened.teacher.spec, recipe)
        codecs = {
            level.name: datasets[idx].codecs[stored.name] for level, stored in zip(levels, recipe.levels, strict=True)
        }
        parts.append(LivePart(opened, levels, 1 + max(view.draw for view in recipe.views), latents, codecs))
    teacher = LiveRecipes(parts, route)
    level = None if config is None else soft_label_level(config, source.levels)
    if config is None or level is None:
        _refuse_interpreter(config)
        return teacher
    assert isinstance(source, JoinedDataset), "soft labels alone are refused"
    labels = source.parts[source.places[level.name, 0].part]
    features = [
        (part, {own: name for (place, own), name in names.items() if place == idx}) for idx, part in enumerate(datasets)
    ]
    return behind_dataset(teacher, labels, level, features, config.interpreter, device)


def _refuse_interpreter(config: DistillRecipeConfig | None) -> None:
    """Raises: ConfigError where an interpreter is given, and no soft labels are learned from."""
    if config is not None and config.interpreter is not None:
        raise ConfigError(
            f"distill.interpreter is {config.interpreter}, and the data has no soft labels to learn from; join those "
            "that it makes (`dtpipe extract --interpreter HEAD --from FEATURES --out LABELS`, then --join), train on "
            "images without a dataset (--images, --teacher), or leave it out"
        )


def _composition(source: FeatureSource) -> tuple[Sequence[FeatureDataset], Route, Mapping[tuple[int, str], str]]:
    """Datasets of features in a source, which samples each encodes, and the names of their levels that are others in
    the source.

    Raises: ConfigError for several joined datasets that are synthesized, whose images would no longer be those of the
    others, and for soft labels without features.
    """
    if isinstance(source, ConcatDataset):
        _refuse_labels_alone(source.parts)
        return source.parts, _route_by_row(source), {}
    if not isinstance(source, JoinedDataset):
        assert isinstance(source, FeatureDataset), "a live teacher needs datasets with a recipe"
        _refuse_labels_alone([source])
        return [source], route_to_one, {}
    kept = [idx for idx, part in enumerate(source.parts) if soft_labels_of(part.recipe) is None]
    features = [source.parts[idx] for idx in kept]
    _refuse_labels_alone(features or source.parts)
    synthesized = [dataset.url for dataset in features if dataset.recipe.synthesized]
    if synthesized and len(features) > 1:
        raise ConfigError(
            f"{synthesized[0]} is synthesized, and a new image has no features in the datasets joined to it; "
            "set --reencode 0"
        )
    names = {
        (kept.index(place.part), place.level): name for (name, _), place in source.places.items() if place.part in kept
    }
    return features, _route_by_view(source, kept), names


def _refuse_labels_alone(datasets: Sequence[FeatureDataset]) -> None:
    if soft_labels_of(datasets[0].recipe) is not None:
        raise ConfigError(
            f"{datasets[0].url} holds soft labels, and their features' teacher would make fresh ones; join the "
            "features with --join, or set --reencode 0"
        )


def _open_each(datasets: Sequence[FeatureDataset], settings: Mapping[str, Any], device: str) -> list[RecipeTeacher]:
    """Each dataset's teacher, loaded once however many it made; `settings` may be for some of several teachers."""
    loaded: dict[str, Teacher] = {}
    refusals: list[DtpipeError] = []
    several = len({dataset.recipe.teacher.weights_blake3 for dataset in datasets}) > 1

    def load(config: TeacherConfig, device: str) -> Teacher:
        name = config.model_dump_json()
        if name not in loaded:
            loaded[name] = load_teacher(config, device)
        return loaded[name]

    def open_as(dataset: FeatureDataset, settings: Mapping[str, Any]) -> RecipeTeacher:
        try:
            return open_teacher(dataset.plan, settings, device, load)
        except DtpipeError as err:
            raise type(err)(f"{dataset.url} cannot be encoded live: {err}") from err

    def open_one(dataset: FeatureDataset) -> RecipeTeacher:
        try:
            return open_as(dataset, settings)
        except DtpipeError as err:
            if not (several and settings):
                raise
            refusals.append(err)
            return open_as(dataset, {})

    teachers = [open_one(dataset) for dataset in datasets]
    if len(refusals) == len(datasets):
        raise TeacherError(f"--teacher is that of none of the datasets: {refusals[0]}")
    return teachers
