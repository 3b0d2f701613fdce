"""Several datasets read as one: joined by key (another teacher, timestep or level), or one after the other (more images).

One rule: what does not fit is refused with what differs; nothing is dropped to make it fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.differences import differences, listed
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset, Integers, Levels, Samples
from dtpipe.manifests.schema import IMAGE, LevelSpec, Recipe, ViewSpec

_SUFFIXES = "bcdefghijklmnopqrstuvwxyz"
_SHOWN = 3  # keys listed in a message


@dataclass(frozen=True)
class Place:
    """Where one view of a joined level lies."""

    part: int
    level: str
    view: int


class JoinedDataset:
    """Datasets over the same keys as one `FeatureSource`; rows are those of the first.

    Parts that store the same levels of the same teacher (other timesteps, draws or flips) are joined along the views.
    Otherwise levels lie side by side, and one whose name is taken becomes `l4.b`, `l4.c` and so on; then all parts need
    the same number of views, with equal flips. A row is ok when it is ok in every part.
    """

    def __init__(self, parts: Sequence[FeatureDataset]) -> None:
        """Raises: ConfigError naming what differs."""
        _refuse_differences(parts, ("transform", "student_px"))
        _refuse_other_keys(parts)
        self.parts, first = tuple(parts), parts[0]
        self._part_rows = [np.array([part.row_of(key) for key in first.keys], np.int64) for part in parts]
        self._images = next((idx for idx, part in enumerate(parts) if part.recipe.images == "stored"), None)
        self._samples = self._join_samples()
        self.image_px, self.num_rows, self.ok_rows = first.image_px, first.num_rows, self._samples.ok_rows()
        self.keys, self.labels, self.status = self._samples.keys, self._samples.labels, self._samples.status
        self.along_views = all(_levels_of(part.recipe) == _levels_of(first.recipe) for part in parts)
        self.levels, self.views, self.places = _join_views(parts) if self.along_views else _join_levels(parts)

    def row_of(self, key: str) -> int:
        """Row of a key. Raises: InputError for an unknown one."""
        return self.parts[0].row_of(key)

    def read_image(self, row: int) -> NDArray[np.uint8]:
        """As `FeatureDataset.read_image`."""
        image: NDArray[np.uint8] = self.read_batch([row], (), [0])[0][0]
        return image

    def read_level(self, name: str, row: int, view: int = 0) -> NDArray[np.generic]:
        """As `FeatureDataset.read_level`."""
        level: NDArray[np.generic] = self.read_batch([row], (name,), [view], images=False)[1][name][0]
        return level

    def read_batch(
        self, rows: Integers, levels: Sequence[str], view_of_row: Integers, images: bool = True
    ) -> tuple[NDArray[np.uint8], Levels]:
        """As `FeatureDataset.read_batch`. Shapes and raises: the same."""
        wanted, views = np.asarray(rows, np.int64), np.asarray(view_of_row, np.int64)
        self._check(wanted, levels, views, images)
        pixels = np.empty((0, *self.image_px, 3), np.uint8)
        if images and self._images is not None:
            pixels, _ = self.parts[self._images].read_batch(
                self._part_rows[self._images][wanted], (), np.zeros_like(wanted)
            )
        specs = {level.name: level for level in self.levels}
        return pixels, {name: self._read_joined(specs[name], wanted, views) for name in levels}

    def _read_joined(self, level: LevelSpec, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.generic]:
        """One level of all rows, each from the part that its view lies in."""
        places = [self.places[level.name, int(view)] for view in views]
        out: NDArray[np.generic] | None = None
        for part_idx in sorted({place.part for place in places}):
            chosen = np.array([idx for idx, place in enumerate(places) if place.part == part_idx], np.int64)
            name = places[chosen[0]].level
            part_views = [places[idx].view for idx in chosen]
            _, found = self.parts[part_idx].read_batch(
                self._part_rows[part_idx][rows[chosen]], (name,), part_views, images=False
            )
            if out is None:
                out = np.empty((len(rows), *found[name].shape[1:]), found[name].dtype)
            out[chosen] = found[name]
        return np.empty((0, level.channels, level.height, level.width), level.dtype) if out is None else out

    def _check(self, rows: NDArray[np.int64], levels: Sequence[str], views: NDArray[np.int64], images: bool) -> None:
        names = [level.name for level in self.levels]
        if unknown := [name for name in levels if name not in names]:
            raise ConfigError(
                f"{_urls(self.parts)} joined have no level {unknown[0]!r}; choose from {', '.join(names)}"
            )
        if images and self._images is None:
            raise ConfigError(f"none of {_urls(self.parts)} stores images; join a dataset that does")
        if len(views) != len(rows) or (len(views) and (views.min() < 0 or views.max() >= len(self.views))):
            raise ConfigError(
                f"{_urls(self.parts)} joined have views 0 to {len(self.views) - 1}; give one of them per row"
            )
        for row in rows:
            if not 0 <= row < self.num_rows or self.status[row] != "ok":
                status = self.status[row] if 0 <= row < self.num_rows else "not in the dataset"
                raise InputError(f"{_urls(self.parts)} joined: row {row} is {status}; read only `ok_rows`")

    def _join_samples(self) -> Samples:
        columns = [[part.status[row] for row in rows] for part, rows in zip(self.parts, self._part_rows, strict=True)]
        status = tuple(next((each for each in found if each != "ok"), "ok") for found in zip(*columns, strict=True))
        labels = [[part.labels[row] for row in rows] for part, rows in zip(self.parts, self._part_rows, strict=True)]
        label = tuple(next((each for each in found if each is not None), None) for found in zip(*labels, strict=True))
        return Samples(self.parts[0].keys, label, status)


class ConcatDataset:
    """Datasets over different keys as one `FeatureSource`, one after the other; all else must be equal."""

    def __init__(self, parts: Sequence[FeatureDataset]) -> None:
        """Raises: ConfigError naming what differs, or the keys that are in two datasets."""
        _refuse_differences(
            parts, ("transform", "teacher", "views", "levels", "codec", "images"), ", or join them with --join"
        )
        _refuse_shared_keys(parts)
        self.parts, first = tuple(parts), parts[0]
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)])
        self.levels, self.views, self.image_px = first.levels, first.views, first.image_px
        self.keys = tuple(key for part in parts for key in part.keys)
        self.labels = tuple(label for part in parts for label in part.labels)
        self.status = tuple(status for part in parts for status in part.status)
        self.num_rows = len(self.keys)
        self.ok_rows = Samples(self.keys, self.labels, self.status).ok_rows()
        self._row_of = {key: row for row, key in enumerate(self.keys)}

    def part_of(self, rows: Integers) -> NDArray[np.int64]:
        """Which of `parts` each row lies in. Shapes: [B] -> [B]."""
        return np.searchsorted(self._starts, np.asarray(rows, np.int64), side="right") - 1

    def row_of(self, key: str) -> int:
        """Row of a key. Raises: InputError for an unknown one."""
        if key not in self._row_of:
            raise InputError(f"none of {_urls(self.parts)} has sample {key!r}; keys look like {self.keys[0]!r}")
        return self._row_of[key]

    def read_image(self, row: int) -> NDArray[np.uint8]:
        """As `FeatureDataset.read_image`."""
        image: NDArray[np.uint8] = self.read_batch([row], (), [0])[0][0]
        return image

    def read_level(self, name: str, row: int, view: int = 0) -> NDArray[np.generic]:
        """As `FeatureDataset.read_level`."""
        level: NDArray[np.generic] = self.read_batch([row], (name,), [view], images=False)[1][name][0]
        return level

    def read_batch(
        self, rows: Integers, levels: Sequence[str], view_of_row: Integers, images: bool = True
    ) -> tuple[NDArray[np.uint8], Levels]:
        """As `FeatureDataset.read_batch`. Shapes and raises: the same."""
        wanted, views = np.asarray(rows, np.int64), np.asarray(view_of_row, np.int64)
        if len(views) != len(wanted):
            raise ConfigError(f"{len(wanted)} rows and {len(views)} views were asked for; give one view per row")
        if outside := [row for row in wanted if not 0 <= row < self.num_rows]:
            raise InputError(f"{_urls(self.parts)} have no row {outside[0]}; they have rows 0 to {self.num_rows - 1}")
        part_of_row = self.part_of(wanted)
        out: dict[str, NDArray[np.generic]] = {}
        for idx in sorted(set(part_of_row.tolist())) or [0]:
            chosen = np.flatnonzero(part_of_row == idx)
            pixels, found = self.parts[idx].read_batch(
                wanted[chosen] - self._starts[idx], levels, views[chosen], images
            )
            for name, values in {IMAGE: pixels, **found}.items():
                whole = out.setdefault(
                    name, np.empty((len(wanted) if len(values) else 0, *values.shape[1:]), values.dtype)
                )
                if len(values):
                    whole[chosen] = values
        image = out.pop(IMAGE)
        return image.astype(np.uint8, copy=False), out


def _levels_of(recipe: Recipe) -> tuple[object, ...]:
    return recipe.teacher, recipe.levels, recipe.codec


def _join_views(
    parts: Sequence[FeatureDataset],
) -> tuple[tuple[LevelSpec, ...], tuple[ViewSpec, ...], dict[tuple[str, int], Place]]:
    """The views of all parts one after the other, of the same levels."""
    views: list[ViewSpec] = []
    places: dict[tuple[str, int], Place] = {}
    seeds: dict[tuple[ViewSpec, int], FeatureDataset] = {}
    for part_idx, part in enumerate(parts):
        for view_idx, view in enumerate(part.views):
            other = seeds.setdefault((view, part.recipe.noise_seed), part)
            if other is not part:
                raise ConfigError(
                    f"{part.url} and {other.url} both hold view {view.model_dump()} of the same teacher, levels and noise seed; "
                    "join only one of them"
                )
            for level in part.levels:
                places[level.name, len(views)] = Place(part_idx, level.name, view_idx)
            views.append(view)
    return parts[0].levels, tuple(views), places


def _join_levels(
    parts: Sequence[FeatureDataset],
) -> tuple[tuple[LevelSpec, ...], tuple[ViewSpec, ...], dict[tuple[str, int], Place]]:
    """The levels of all parts side by side, under names that are free."""
    _refuse_other_flips(parts)
    levels: dict[str, LevelSpec] = {}
    places: dict[tuple[str, int], Place] = {}
    for part_idx, part in enumerate(parts):
        for level in part.levels:
            name = _free_name(level.name, levels)
            levels[name] = level.model_copy(update={"name": name})
            places.update({(name, view): Place(part_idx, level.name, view) for view in range(len(part.views))})
    return tuple(levels.values()), parts[0].views, places


def _free_name(name: str, taken: Mapping[str, LevelSpec]) -> str:
    if name not in taken:
        return name
    base = name.split(".")[0]
    free = [f"{base}.{suffix}" for suffix in _SUFFIXES if f"{base}.{suffix}" not in taken]
    if not free:
        raise ConfigError(f"more than {len(_SUFFIXES)} levels are called {base}; join fewer datasets")
    return free[0]


def _refuse_differences(parts: Sequence[FeatureDataset], fields: Sequence[str], otherwise: str = "") -> None:
    if not parts:
        raise ConfigError("no dataset was given; name at least one")
    first = parts[0].recipe.model_dump(mode="json", include=set(fields))
    for part in parts[1:]:
        if changes := differences(first, part.recipe.model_dump(mode="json", include=set(fields))):
            raise ConfigError(
                f"{parts[0].url} and {part.url} do not fit ({listed(changes)}); extract one of them again with equal "
                f"settings{otherwise}"
            )


def _refuse_other_keys(parts: Sequence[FeatureDataset]) -> None:
    first = set(parts[0].keys)
    for part in parts[1:]:
        found = set(part.keys)
        if found != first:
            only = [
                *(f"{key!r} only in {parts[0].url}" for key in sorted(first - found)),
                *(f"{key!r} only in {part.url}" for key in sorted(found - first)),
            ]
            raise ConfigError(
                f"{parts[0].url} and {part.url} are not over the same keys: {len(only)} differ ({'; '.join(only[:_SHOWN])}); "
                "extract the same samples (--keys), or leave --join out to read one after the other"
            )


def _refuse_shared_keys(parts: Sequence[FeatureDataset]) -> None:
    owner: dict[str, FeatureDataset] = {}
    for part in parts:
        shared = [key for key in part.keys if key in owner]
        if shared:
            raise ConfigError(
                f"{owner[shared[0]].url} and {part.url} share {len(shared)} keys ({', '.join(map(repr, shared[:_SHOWN]))}); "
                "join them by key with --join, or extract other samples"
            )
        owner.update(dict.fromkeys(part.keys, part))


def _refuse_other_flips(parts: Sequence[FeatureDataset]) -> None:
    first = [view.flip for view in parts[0].views]
    for part in parts[1:]:
        flips = [view.flip for view in part.views]
        if flips != first:
            raise ConfigError(
                f"{parts[0].url} and {part.url} hold different levels and their views do not pair up "
                f"(flips {first} and {flips}); extract one of them again with as many views"
            )


def _urls(parts: Sequence[FeatureDataset]) -> str:
    return ", ".join(part.url for part in parts)
