"""Training without a feature dataset: images and a teacher, or a GAN that makes its own, read as a `FeatureSource`.

The `extract` section says what the samples are, as it does for `dtpipe extract`; nothing is stored, so every sample is
encoded live, in epoch e with noise draw e. Order and epoch size are fixed before training: all images are looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.record import refuse_other_data
from dtpipe.distill.stream.choice import select_rows
from dtpipe.distill.stream.data import OpenedData, rows_record
from dtpipe.distill.stream.sampling import Sampling
from dtpipe.extract.config import LiveConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.recipe import list_source, make_recipe, with_whole_paths
from dtpipe.extract.shards.rows import RowReader
from dtpipe.extract.sources.registry import open_images
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.codecs.coded import CodedLevels
from dtpipe.manifests.errors import BadImage, ConfigError, InputError
from dtpipe.manifests.read.source import Columns, Integers
from dtpipe.manifests.schema import LevelSpec, Recipe, ViewSpec
from dtpipe.manifests.write.listing import Listing
from dtpipe.pipeline.live.check import OnChecked, check_images, kept_result
from dtpipe.pipeline.live.recorded import RecipeTeacher

if TYPE_CHECKING:
    from collections.abc import Mapping

SECTION = "extract"


class LiveSource:
    """Samples that have images and no stored features; a `FeatureSource`. `teacher` is the one that encodes them."""

    def __init__(self, reader: RowReader, teacher: RecipeTeacher, bad: Mapping[str, str]) -> None:
        """`bad`: key to reason of the samples that cannot be used."""
        recipe, listing = reader.recipe, reader.listing
        self.recipe, self.teacher, self.reader = recipe, teacher, reader
        self.levels: tuple[LevelSpec, ...] = recipe.levels
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
                f"sample {self.columns.keys[row]}: {err.reason}; it was good when the run began: restore it and run again, "
                "or begin another --out"
            ) from err


def live_settings(config: LiveConfig) -> LiveConfig:
    """The settings as live training reads them: whole paths, and one stored draw's worth of views, since none is stored."""
    return with_whole_paths(config.model_copy(update={"noise": config.noise.model_copy(update={"draws": 1})}))


def open_live_data(extract: LiveConfig, on_checked: OnChecked | None, check: bool, config: DistillConfig) -> OpenedData:
    """The samples that the settings name, ready to train on without a dataset.

    `check`: look at all images that have not been looked at for this run; without it, only what was found then is known to be bad.
    Raises: ConfigError, InputError, TeacherError as `dtpipe extract` does; PlanChangedError naming what differs from what the run
    in `out` was trained on; ErrorBudgetError when too many images are bad.
    """
    extract = live_settings(extract)
    images = open_images(extract.images, extract.num_samples, extract.source.kind)
    listing = list_source(extract, images)
    device = pick_device(config.device)
    teacher = load_teacher(extract.teacher, device)
    recipe = make_recipe(extract, teacher, images.kind, device)
    reader = RowReader(images, listing, recipe, teacher.spec, extract.source.max_pixels)
    opened = RecipeTeacher(recipe, extract.teacher, device, teacher=teacher)
    record = {"live": _content(recipe), "listing": _listing_record(listing)}
    refuse_other_data(Path(config.out), record, partly=True)
    source = LiveSource(reader, opened, {})
    rows = select_rows(source, config)
    if not recipe.synthesized:
        source = LiveSource(reader, opened, _bad_images(reader, rows, extract, Path(config.out), on_checked, check))
        rows = rows[np.isin(rows, source.columns.ok_rows)]
        if len(rows) == 0:
            raise InputError(f"{extract.images}: none of the images can be used; look at one of them")
    record = {**record, "samples": rows_record(rows)}
    digest = blake3(canonical_json(record)).hexdigest()
    sections = {SECTION: extract.model_dump(mode="json")}
    return OpenedData(source, recipe.student_px, digest, Sampling(rows, len(source.columns)), None, record, sections)


def _bad_images(
    reader: RowReader,
    rows: NDArray[np.int64],
    extract: LiveConfig,
    run: Path,
    on_checked: OnChecked | None,
    check: bool,
) -> Mapping[str, str]:
    """Key to reason, as found now, or without `check` as far as a run knows already."""
    if not check:
        return kept_result(reader, rows, run) or {}
    return check_images(reader, rows, run, extract.run.max_bad_samples, on_checked)


def _content(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides what training sees: not how it would be stored, nor where it runs."""
    kept = recipe.model_dump(
        mode="json", include={"source", "transform", "student_px", "teacher", "noise_seed", "views"}
    )
    levels = [level.model_dump(mode="json", exclude={"dtype", "codec"}) for level in recipe.levels]
    return {**kept, "levels": levels, "dtype": recipe.compute.dtype}


def _listing_record(listing: Listing) -> dict[str, Any]:
    return {"num": len(listing), "keys_blake3": blake3("\n".join(listing.keys).encode()).hexdigest()}
