"""Several datasets read as one: joined by key (another teacher, timestep or level), or one after the other (more
images).

One rule: what does not fit is refused with what differs; nothing is dropped to make it fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.differences import differences, listed
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.same_images import refuse_other_images
from dtpipe.manifests.read.source import Columns, FeatureSource, Integers, read_images
from dtpipe.manifests.read.texts import one_after_another
from dtpipe.manifests.schema import CodecSpec, LevelSpec, Recipe, ViewSpec
from dtpipe.manifests.soft_labels import label_view_of, live_features_of, soft_labels_of
from dtpipe.manifests.words import count_of

_SUFFIXES = "bcdefghijklmnopqrstuvwxyz"
_SHOWN = 3  # keys listed in a message


@dataclass(frozen=True)
class StoredView:
    """Where one view of a joined level lies."""

    part: int
    level: str
    view: int


class JoinedDataset:
    """Datasets over the same keys as one `FeatureSource`; rows are those of the first.

    Parts that store the same levels of the same teacher (other timesteps, draws or flips) are joined along the views.
    Otherwise levels lie side by side, and one whose name is taken becomes `l4.b`, `l4.c` and so on; then all parts need
    the same number of views, with equal flips, and the views are those of the first. Soft labels need no equal list:
    each view of the features gets the labels of the same view, else of its draw and flip, else of its flip, where
    there is one such view and no more (`label_view_of`). A row is ok when it is ok in every part.
    """

    def __init__(self, parts: Sequence[FeatureDataset]) -> None:
        """Raises: ConfigError naming what differs."""
        _refuse_differences(parts, ("transform", "student_px"))
        _refuse_other_keys(parts)
        _refuse_other_makers(parts)
        refuse_other_images(parts)
        self.parts, first = tuple(parts), parts[0]
        self._part_rows = [
            np.array([part.columns.row_of(key) for key in first.columns.keys], np.int64) for part in parts
        ]
        self._images = next((idx for idx, part in enumerate(parts) if part.recipe.images == "stored"), None)
        self.columns, self.image_px = self._join_columns(), first.image_px
        self.along_views = all(_same_levels(part.recipe, first.recipe) for part in parts)
        self.levels, self.views, self.places = _join_views(parts) if self.along_views else _join_levels(parts)

    def read(
        self, rows: Integers, names: Sequence[str], views: Integers, images: bool = True
    ) -> tuple[NDArray[np.uint8], CodedLevels]:
        """As `FeatureSource.read`."""
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        self._check(rows, names, views, images)
        pixels = np.empty((0, *self.image_px, 3), np.uint8)
        if images and self._images is not None:
            pixels = read_images(self.parts[self._images], self._part_rows[self._images][rows])
        return pixels, CodedLevels(len(rows), {name: self._read_level(name, rows, views) for name in names})

    def _read_level(self, name: str, rows: NDArray[np.integer], views: NDArray[np.integer]) -> list[CodedPiece]:
        """One level of all rows, each from the part that its view lies in."""
        places = [self.places[name, int(view)] for view in views]
        pieces = []
        for part_idx in sorted({place.part for place in places}) or [self.places[name, 0].part]:
            chosen = np.array([idx for idx, place in enumerate(places) if place.part == part_idx], np.int64)
            part_rows, part_views = self._part_rows[part_idx][rows[chosen]], [places[idx].view for idx in chosen]
            level = self.places[name, int(views[chosen[0]]) if len(chosen) else 0].level
            _, coded = self.parts[part_idx].read(part_rows, (level,), part_views, images=False)
            pieces += [replace(piece, rows=chosen) for piece in coded.pieces[level]]
        return pieces

    def _check(self, rows: NDArray[np.integer], names: Sequence[str], views: NDArray[np.integer], images: bool) -> None:
        stored = [level.name for level in self.levels]
        if unknown := [name for name in names if name not in stored]:
            raise ConfigError(f"{self.columns.where} have no level {unknown[0]!r}; choose from {', '.join(stored)}")
        if images and self._images is None:
            raise ConfigError(f"none of {_urls(self.parts)} stores images; join a dataset that does")
        if len(views) != len(rows) or (len(views) and (views.min() < 0 or views.max() >= len(self.views))):
            raise ConfigError(f"{self.columns.where} have views 0 to {len(self.views) - 1}; give one of them per row")
        for row in rows:
            status = self.columns.status[row] if 0 <= row < len(self.columns) else "not in the dataset"
            if status != "ok":
                raise InputError(f"{self.columns.where}: row {row} is {status}; read only `ok_rows`")

    def _join_columns(self) -> Columns:
        """Of each row, the first status that is not ok and the first label there is."""
        by_part = list(zip((part.columns for part in self.parts), self._part_rows, strict=True))
        statuses = zip(*([columns.status[row] for row in rows] for columns, rows in by_part), strict=True)
        labels = zip(*([columns.labels[row] for row in rows] for columns, rows in by_part), strict=True)
        return Columns(
            f"{_urls(self.parts)} joined",
            self.parts[0].columns.keys,
            tuple(next((label for label in of_row if label is not None), None) for of_row in labels),
            tuple(next((status for status in of_row if status != "ok"), "ok") for of_row in statuses),
        )


class ConcatDataset:
    """Datasets over different keys as one `FeatureSource`, one after the other; all but the codecs must be equal."""

    def __init__(self, parts: Sequence[FeatureDataset]) -> None:
        """Raises: ConfigError naming what differs, or the keys that are in two datasets."""
        _refuse_differences(parts, ("transform", "teacher", "views", "levels", "images"), ", or join them with --join")
        _refuse_shared_keys(parts)
        self.parts, first = tuple(parts), parts[0]
        self._starts = np.cumsum([0, *(len(part.columns) for part in parts)])
        self.levels, self.views, self.image_px = first.levels, first.views, first.image_px
        self.columns = Columns(
            _urls(parts),
            one_after_another([part.columns.keys for part in parts]),
            one_after_another([part.columns.labels for part in parts]),
            one_after_another([part.columns.status for part in parts]),
        )

    def part_of(self, rows: Integers) -> NDArray[np.int64]:
        """Which of `parts` each row lies in. Shapes: [B] -> [B]."""
        return np.searchsorted(self._starts, np.asarray(rows, np.int64), side="right") - 1

    def read(
        self, rows: Integers, names: Sequence[str], views: Integers, images: bool = True
    ) -> tuple[NDArray[np.uint8], CodedLevels]:
        """As `FeatureSource.read`."""
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        self._check(rows, views)
        part_of_row = self.part_of(rows)
        pixels = np.empty((len(rows) if images else 0, *self.image_px, 3), np.uint8)
        pieces: dict[str, list[CodedPiece]] = {name: [] for name in names}
        for idx in sorted(set(part_of_row.tolist())) or [0]:
            chosen = np.flatnonzero(part_of_row == idx)
            part_pixels, coded = self.parts[idx].read(rows[chosen] - self._starts[idx], names, views[chosen], images)
            if images:
                pixels[chosen] = part_pixels
            for name, of_level in coded.pieces.items():
                pieces[name] += [replace(piece, rows=chosen) for piece in of_level]
        return pixels, CodedLevels(len(rows), pieces)

    def _check(self, rows: NDArray[np.integer], views: NDArray[np.integer]) -> None:
        """What no part can see; the rest each part checks itself."""
        if len(views) != len(rows):
            raise ConfigError(f"{len(rows)} rows and {len(views)} views were asked for; give one view per row")
        if outside := [row for row in rows if not 0 <= row < len(self.columns)]:
            last = len(self.columns) - 1
            raise InputError(f"{self.columns.where} have no row {outside[0]}; they have rows 0 to {last}")


def composed(parts: Sequence[FeatureDataset], join: bool) -> FeatureSource:
    """One dataset as it is, several joined by key or one after the other. Raises: ConfigError naming what differs."""
    if len(parts) == 1:
        return parts[0]
    return JoinedDataset(parts) if join else ConcatDataset(parts)


def _without_codecs(recipe: Recipe) -> Recipe:
    """What features are of, whatever they lie under."""
    levels = tuple(level.model_copy(update={"codec": CodecSpec()}) for level in recipe.levels)
    return recipe.model_copy(update={"levels": levels})


def _same_levels(one: Recipe, other: Recipe) -> bool:
    return one.teacher == other.teacher and _without_codecs(one).levels == _without_codecs(other).levels


def _join_views(
    parts: Sequence[FeatureDataset],
) -> tuple[tuple[LevelSpec, ...], tuple[ViewSpec, ...], dict[tuple[str, int], StoredView]]:
    """The views of all parts one after the other, of the same levels."""
    views: list[ViewSpec] = []
    places: dict[tuple[str, int], StoredView] = {}
    seeds: dict[tuple[ViewSpec, int], FeatureDataset] = {}
    for part_idx, part in enumerate(parts):
        for view_idx, view in enumerate(part.views):
            other = seeds.setdefault((view, part.recipe.noise_seed), part)
            if other is not part:
                raise ConfigError(
                    f"{part.url} and {other.url} both hold view {view.model_dump()} of the same teacher, levels and "
                    "noise seed; join only one of them"
                )
            for level in part.levels:
                places[level.name, len(views)] = StoredView(part_idx, level.name, view_idx)
            views.append(view)
    return parts[0].levels, tuple(views), places


def _join_levels(
    parts: Sequence[FeatureDataset],
) -> tuple[tuple[LevelSpec, ...], tuple[ViewSpec, ...], dict[tuple[str, int], StoredView]]:
    """The levels of all parts side by side, under names that are free."""
    of_features = [part for part in parts if soft_labels_of(part.recipe) is None] or parts
    _refuse_other_flips(of_features)
    first = of_features[0]
    levels: dict[str, LevelSpec] = {}
    places: dict[tuple[str, int], StoredView] = {}
    for part_idx, part in enumerate(parts):
        stored = range(len(first.views)) if part in of_features else _paired_labels(first, part)
        for level in part.levels:
            name = _free_name(level.name, levels)
            levels[name] = level.model_copy(update={"name": name})
            places.update({(name, view): StoredView(part_idx, level.name, idx) for view, idx in enumerate(stored)})
    return tuple(levels.values()), first.views, places


def _paired_labels(features: FeatureDataset, labels: FeatureDataset) -> list[int]:
    """Which view of soft labels goes with each view of features. Raises: ConfigError where none does, or several."""
    chosen = [label_view_of(view, labels.views) for view in features.views]
    if None in chosen:
        view = features.views[chosen.index(None)]
        raise ConfigError(
            f"{labels.url} holds soft labels, and no one view of them goes with view {view.model_dump()} of "
            f"{features.url}; its views are {[label.model_dump() for label in labels.views]}; make labels of these "
            f"features (dtpipe extract --interpreter .. --from {features.url})"
        )
    return [idx for idx in chosen if idx is not None]


def _free_name(name: str, used: Mapping[str, LevelSpec]) -> str:
    if name not in used:
        return name
    base = name.split(".")[0]
    free = [f"{base}.{suffix}" for suffix in _SUFFIXES if f"{base}.{suffix}" not in used]
    if not free:
        raise ConfigError(f"more than {len(_SUFFIXES)} levels are called {base}; join fewer datasets")
    return free[0]


def _refuse_differences(parts: Sequence[FeatureDataset], fields: Sequence[str], otherwise: str = "") -> None:
    if not parts:
        raise ConfigError("no dataset was given; name at least one")
    first, *others = (_without_codecs(part.recipe).model_dump(mode="json", include=set(fields)) for part in parts)
    for part, other in zip(parts[1:], others, strict=True):
        if changes := differences(first, other):
            raise ConfigError(
                f"{parts[0].url} and {part.url} do not fit ({listed(changes)}); extract one of them again with equal "
                f"settings{otherwise}"
            )


def _refuse_other_keys(parts: Sequence[FeatureDataset]) -> None:
    first = set(parts[0].columns.keys)
    for part in parts[1:]:
        keys = set(part.columns.keys)
        if keys != first:
            only = [
                *(f"{key!r} only in {parts[0].url}" for key in sorted(first - keys)),
                *(f"{key!r} only in {part.url}" for key in sorted(keys - first)),
            ]
            raise ConfigError(
                f"{parts[0].url} and {part.url} are not over the same keys: {count_of(len(only), 'key')} of one alone "
                f"({'; '.join(only[:_SHOWN])}); extract the same samples (--keys), or leave --join out to "
                "read one after the other"
            )


def _refuse_other_makers(parts: Sequence[FeatureDataset]) -> None:
    """Samples that generators made have the same keys, whoever made them: they go by weights and noise."""
    made = [part for part in parts if part.recipe.synthesized]
    makers = [made_by for part in made if (made_by := _maker(part)) is not None]
    for part, maker in makers[1:]:
        other, first = makers[0]
        if maker != first:
            raise ConfigError(
                f"{other.url} and {part.url} hold images of two generators, or of two noise seeds, under the same "
                "keys; join only what was made of the same images"
            )


def _maker(part: FeatureDataset) -> tuple[FeatureDataset, tuple[str, int]] | None:
    """Digest and noise seed of the generator of a part; None of labels whose features lie in another dataset."""
    recipe = live_features_of(part.recipe) or part.recipe
    if soft_labels_of(recipe) is not None:
        return None
    return part, (recipe.teacher.weights_blake3, recipe.noise_seed)


def _refuse_shared_keys(parts: Sequence[FeatureDataset]) -> None:
    owner: dict[str, FeatureDataset] = {}
    for part in parts:
        shared = [key for key in part.columns.keys if key in owner]
        if shared:
            raise ConfigError(
                f"{owner[shared[0]].url} and {part.url} share {count_of(len(shared), 'key')} "
                f"({', '.join(map(repr, shared[:_SHOWN]))}); join them by key with --join, or extract other samples"
            )
        owner.update(dict.fromkeys(part.columns.keys, part))


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
