"""Features of labelled images: from the dataset where it holds them, else from the teacher that made it.

What the teacher gives is what `extract` would store for the image under its key, but for the codec and last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.labels.data import LabelledFeatures
from dtpipe.distill.labels.interpreter import InterpreterLevel
from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import ViewSpec
from dtpipe.manifests.words import are, count_of
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.interpret.config import InterpretConfig
from dtpipe.pipeline.interpret.places import FoundRows, find_rows, own_key, places_by_content
from dtpipe.pipeline.live.recorded import RecipeTeacher, open_teacher
from dtpipe.pipeline.rivals.digests import DigestStore

if TYPE_CHECKING:
    from torch import Tensor

Reading = tuple[ViewSpec, ...]
"""Views that are read together."""


@dataclass(frozen=True)
class BothSides:
    """Features of labelled and of held-out images, and where they come from."""

    train: LabelledFeatures
    test: LabelledFeatures
    found: FoundRows
    """Of the labelled ones."""
    held_out: FoundRows


def readings_of(views: Sequence[ViewSpec], together: bool) -> list[Reading]:
    """What is read at once of unflipped images: each view, or all timesteps of each noise draw.

    Raises: ConfigError where draws have different timesteps.
    """
    unflipped = [view for view in views if not view.flip]
    if not together:
        return [(view,) for view in unflipped]
    groups = {view.draw: tuple(other for other in unflipped if other.draw == view.draw) for view in unflipped}
    if len({len(group) for group in groups.values()}) > 1:
        raise ConfigError("the dataset has more timesteps of some noise draws than of others; leave out --together")
    return list(groups.values())


def open_both(
    config: InterpretConfig,
    dataset: FeatureDataset,
    labelled: tuple[LabelledSet, LabelledSet],
    store: DigestStore,
    note: Note,
) -> BothSides:
    """Find the features of labelled and held-out images, and load the teacher where it is needed.

    `store` keeps digests of a large dataset's images.
    Raises: ConfigError for levels that are not there, or flips that cannot be had; ConfigError or TeacherError where
    images are not in the dataset and its teacher cannot be had.
    """
    levels, readings = _levels(config, dataset), readings_of(dataset.views, config.together)
    by_content = places_by_content(dataset, store)
    found, held_out = (find_rows(dataset, side, by_content) for side in labelled)
    if dataset.recipe.images != "stored":
        note(f"{dataset.url} stores no images, so labelled ones are known by their keys alone")
    teachers = _Teachers(config, dataset)
    if missing := found.num_missing + held_out.num_missing:
        teachers.need(missing)
    flips = _flips(config, dataset, readings, teachers, note)
    kept = _Kept(config.run.kept_bytes)

    def side(number: int, rows: FoundRows) -> LabelledFeatures:
        reader = _Reader(dataset, labelled[number], rows.rows, [level.name for level in levels], readings, teachers)
        read = lambda row, reading, flip: kept.get((number, row, reading, flip), reader)  # noqa: E731
        return LabelledFeatures(labelled[number], levels, read, len(readings[0]), len(readings), flips)

    return BothSides(side(0, found), side(1, held_out), found, held_out)


def _levels(config: InterpretConfig, dataset: FeatureDataset) -> tuple[InterpreterLevel, ...]:
    there = {level.name: level for level in dataset.levels if level.role == "features"}
    names = tuple(there) if config.levels is None else config.levels
    if unknown := [name for name in names if name not in there]:
        raise ConfigError(f"{dataset.url} has no features called {unknown[0]}; choose from {', '.join(there)}")
    if not names:
        raise ConfigError(f"{dataset.url} holds no features; give a dataset of a teacher's")
    return tuple(InterpreterLevel(name, there[name].stride, there[name].channels) for name in dict.fromkeys(names))


def _flips(
    config: InterpretConfig, dataset: FeatureDataset, readings: Sequence[Reading], teachers: _Teachers, note: Note
) -> bool:
    """Whether mirrored images have features; what is wrong with them is said. Raises: ConfigError."""
    if config.flip == "never":
        return False
    stored = all(replace_flip(view) in dataset.views for reading in readings for view in reading)
    if stored and teachers.opened is None:
        return True
    try:
        teachers.open()
    except DtpipeError as err:
        why = f"no flipped views are stored, and {err}"
    else:
        return True
    if config.flip == "always":
        raise ConfigError(f"images cannot be mirrored: {why}; leave out --flip always")
    note(f"images are not mirrored: {why}")
    return False


def replace_flip(view: ViewSpec) -> ViewSpec:
    """The same view of the mirrored image."""
    return view.model_copy(update={"flip": not view.flip})


@dataclass
class _Teachers:
    """The dataset's teacher, loaded once when it is first needed."""

    config: InterpretConfig
    dataset: FeatureDataset
    opened: RecipeTeacher | None = None

    def need(self, num_missing: int) -> None:
        """Raises: as `open`, saying how many images need it."""
        try:
            self.open()
        except DtpipeError as err:
            images = count_of(num_missing, "labelled or held-out image")
            raise type(err)(f"{images} {are(num_missing)} not in {self.dataset.url}, and {err}") from err

    def open(self) -> RecipeTeacher:
        """Raises: ConfigError for one that makes its own images, or that nobody says where it is; TeacherError."""
        if self.dataset.recipe.synthesized:
            raise ConfigError(
                "its teacher makes its own images and cannot encode others; label images of the dataset (`dtpipe "
                "extract --save-png` writes them)"
            )
        if self.opened is None:
            given = {} if self.config.teacher is None else {"path": self.config.teacher}
            self.opened = open_teacher(self.dataset.plan, given, self.config.run.device)
        return self.opened


@dataclass(frozen=True)
class _Reader:
    """Reads the features of one side's images."""

    dataset: FeatureDataset
    labelled: LabelledSet
    rows: Sequence[int | None]
    names: Sequence[str]
    readings: Sequence[Reading]
    teachers: _Teachers

    def __call__(self, row: int, reading: int, flip: bool) -> dict[str, Tensor]:
        """Shapes: -> {level: (V * C, h, w)} float32."""
        import torch

        views = [replace_flip(view) if flip else view for view in self.readings[reading]]
        place = self.rows[row]
        if place is not None and all(view in self.dataset.views for view in views):
            idxs = [self.dataset.views.index(view) for view in views]
            _, coded = self.dataset.read([place] * len(idxs), self.names, idxs, images=False)
            values = {name: torch.from_numpy(level) for name, level in coded.decode().items()}
        else:
            values = self._encoded(row, views)
        return {name: level.float().flatten(0, 1) for name, level in values.items()}

    def _encoded(self, row: int, views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Alone, so that no other image decides its last bits. Shapes: -> {level: (V, C, h, w)}."""
        import torch

        opened, key = self.teachers.open(), own_key(self.labelled.keys[row])
        rows = recipe_rows(opened.recipe, opened.teacher.spec, [key], views=views)
        rows = replace(rows, images=torch.from_numpy(self.labelled.image(row)[None]))
        levels = encode(opened.teacher, rows, opened.device).levels
        return {name: levels[name][0].clone().cpu() for name in self.names}


@dataclass
class _Kept:
    """What was read, up to a number of bytes."""

    free_bytes: int
    values: dict[tuple[int, int, int, bool], Mapping[str, Tensor]] = field(default_factory=dict)

    def get(self, place: tuple[int, int, int, bool], reader: _Reader) -> Mapping[str, Tensor]:
        """What was kept of a place, or what is read now."""
        if place in self.values:
            return self.values[place]
        fresh = reader(*place[1:])
        num_bytes = sum(level.numel() * level.element_size() for level in fresh.values())
        if num_bytes <= self.free_bytes:
            self.values[place] = fresh
            self.free_bytes -= num_bytes
        return fresh
