"""Training without a feature dataset: images and a teacher, or a GAN that makes its own, read as a `FeatureSource`.

The `extract` section says what the samples are, as it does for `dtpipe extract`; nothing is stored, so every sample is
encoded live, in epoch e with noise draw e. Order and epoch size are fixed before training: all images are looked at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.record import read_record, refuse_other_data
from dtpipe.distill.stream.choice import select_rows
from dtpipe.distill.stream.data import OpenedData, rows_record
from dtpipe.distill.stream.sampling import Sampling
from dtpipe.extract.config import LiveConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.recipe import list_source, make_recipe, with_timesteps_of
from dtpipe.extract.shards.reader import ImageReader
from dtpipe.extract.sources.registry import open_images
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.codecs.coded import CodedLevels
from dtpipe.manifests.errors import BadImage, ConfigError, InputError
from dtpipe.manifests.read.source import Columns, FeatureSource, Integers
from dtpipe.manifests.schema import LevelSpec, Recipe, ViewSpec
from dtpipe.pipeline.live.check import OnChecked, check_images, known_bad
from dtpipe.pipeline.live.labels import LiveLabels, behind_teacher, live_labels
from dtpipe.pipeline.live.recorded import RecipeTeacher
from dtpipe.pipeline.live.teacher import LivePart, LiveRecipes, route_to_one

if TYPE_CHECKING:
    import torch

    from dtpipe.distill.stream.live import LiveTeacher

FindBad = Callable[[ImageReader, NDArray[np.int64], Path], Mapping[str, str]]
"""Key to reason of the bad ones among some rows, for a run folder."""

SECTION = "extract"


class LiveSource:
    """Samples that have images and no stored features; a `FeatureSource`. `teacher` is the one that encodes them."""

    def __init__(
        self, reader: ImageReader, teacher: RecipeTeacher, bad: Mapping[str, str], labels: LiveLabels | None = None
    ) -> None:
        """`bad`: key to reason of the samples that cannot be used; `labels`: made of the features, where there are."""
        recipe, listing = teacher.recipe, reader.listing
        self.recipe, self.teacher, self.reader = recipe, teacher, reader
        self.labels = labels
        self.levels: tuple[LevelSpec, ...] = (*recipe.levels, *([] if labels is None else [labels.level]))
        self.views: tuple[ViewSpec, ...] = recipe.views
        self.image_px = (recipe.transform.height, recipe.transform.width)
        status = tuple(f"bad: {bad[key]}" if key in bad else "ok" for key in listing.keys)
        self.columns = Columns("the source", listing.keys, listing.labels, status)

    def read(
        self,
        rows: Integers,
        names: Sequence[str],
        views: Integers,  # noqa: ARG002  nothing is stored
        images: bool = True,
    ) -> tuple[NDArray[np.uint8], CodedLevels]:
        """Images of some rows, decoded now; zeros where the teacher makes them.

        Raises: ConfigError when levels are asked for; InputError when an image cannot be read.
        """
        if names:
            raise ConfigError(f"level {names[0]} is not stored: this run encodes live")
        pixels = np.zeros((len(rows) if images else 0, *self.image_px, 3), np.uint8)
        if not self.recipe.synthesized:
            for idx in range(len(pixels)):
                pixels[idx] = self._image(int(rows[idx]))
        return pixels, CodedLevels(len(rows), {})

    def _image(self, row: int) -> NDArray[np.uint8]:
        try:
            return self.reader.image(row)
        except BadImage as err:
            raise InputError(
                f"sample {self.columns.keys[row]}: {err.reason}; it was good when the run began: restore it and run "
                "again, or begin another --out"
            ) from err


@dataclass(frozen=True)
class LiveData:
    """Images and a teacher in place of a dataset, as the `extract` section says; `TrainingData`."""

    extract: LiveConfig
    on_checked: OnChecked | None = None
    """Shown how far the look at all images is."""

    def open(self, config: DistillConfig) -> OpenedData:
        """The samples that the settings name; without the bad ones, if this run's images were looked at before.

        Raises: ConfigError, InputError, TeacherError as `dtpipe extract` does; PlanChangedError naming what differs
        from what the run in `out` was trained on.
        """
        return self._open(config, known_bad)

    def open_checked(self, config: DistillConfig) -> OpenedData:
        """As `open`, once all images have been looked at for this run.

        Raises: as `open`; ErrorBudgetError when too many are bad.
        """
        check = partial(check_images, max_bad=self.extract.run.max_bad_samples, on_checked=self.on_checked)
        return self._open(config, check)

    def teacher(self, source: FeatureSource, device: torch.device) -> LiveTeacher:  # noqa: ARG002  it is loaded already
        """The teacher that was loaded to open the source, which knows what samples it takes."""
        assert isinstance(source, LiveSource)
        recipe = source.recipe
        teacher = LiveRecipes([LivePart(source.teacher, recipe.levels)], route_to_one)
        return teacher if source.labels is None else behind_teacher(teacher, source.labels, recipe)

    def _open(self, config: DistillConfig, find_bad: FindBad) -> OpenedData:
        noise = self.extract.noise.model_copy(update={"draws": 1})  # none is stored, so views are those of one draw
        run = Path(config.run.out)
        extract = with_timesteps_of(self.extract.model_copy(update={"noise": noise}), _views_of_run(run))
        reader, opened = _open_reader(extract, pick_device(config.run.device))
        recipe = opened.recipe
        extract = with_timesteps_of(extract, recipe.views)
        listing = {"num": len(reader.listing), "keys_blake3": blake3_hex("\n".join(reader.listing.keys).encode())}
        record: dict[str, Any] = {"live": _content(recipe), "listing": listing}
        labels = None
        if config.interpreter is not None:
            labels = live_labels(config.interpreter, recipe, opened.device)
            record["interpreter"] = labels.head.digest
        refuse_other_data(run, record, partly=True)
        source = LiveSource(reader, opened, {}, labels)
        rows = select_rows(source, config)
        if not recipe.synthesized:
            source = LiveSource(reader, opened, find_bad(reader, rows, run), labels)
            rows = rows[np.isin(rows, source.columns.ok_rows)]
            if len(rows) == 0:
                raise InputError(f"{extract.images}: none of the images can be used; look at one of them")
        record["samples"] = rows_record(rows)
        return OpenedData(
            source,
            recipe.student_px,
            digest=blake3_hex(canonical_json(record)),
            sampling=Sampling(rows, len(source.columns)),
            classes={} if labels is None else {labels.level.name: labels.head.network.spec.classes.names},
            record=record,
            sections={SECTION: extract.model_dump(mode="json")},
        )


def _open_reader(extract: LiveConfig, device: str) -> tuple[ImageReader, RecipeTeacher]:
    images = open_images(extract.images, extract.num_samples, extract.source.kind)
    listing = list_source(extract, images)
    teacher = load_teacher(extract.teacher, device)
    recipe = make_recipe(extract, teacher, images.kind, device)
    reader = ImageReader(images, listing, recipe.transform, extract.source.max_pixels)
    return reader, RecipeTeacher(recipe, teacher, device)


def _views_of_run(run: Path) -> list[ViewSpec]:
    """The views that a run in a folder was begun with; none where there is no run."""
    live = (read_record(run) or {}).get("live") or {}
    return [ViewSpec.model_validate(view) for view in live.get("views", ())]


def _content(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides what training sees: not how it would be stored, nor where it runs."""
    fields = {"source", "transform", "student_px", "teacher", "noise_seed", "views"}
    levels = [level.model_dump(mode="json", exclude={"dtype", "codec"}) for level in recipe.levels]
    return {**recipe.model_dump(mode="json", include=fields), "levels": levels, "dtype": recipe.compute.dtype}
