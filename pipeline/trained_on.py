"""What a run was trained on, as far as its folder says and is still there: images, and the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtpipe.distill.engine.record import read_record
from dtpipe.distill.engine.run_folder import read_config
from dtpipe.extract.config import LiveConfig, NoiseConfig, TransformConfig
from dtpipe.extract.recipe import list_source
from dtpipe.extract.sources.registry import open_images
from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.schema import Plan, TransformRecipe, height_width
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import load_plan
from dtpipe.pipeline.live.recorded import recorded_teacher


@dataclass(frozen=True)
class RunTeacher:
    """The teacher of a run: its settings, and how it was used."""

    settings: Mapping[str, Any]
    """`extract.teacher`; without a path where nobody recorded it."""
    timestep: int | None
    image_px: tuple[int, int] | None
    synthesizes: bool = False


@dataclass(frozen=True)
class TrainedOn:
    """The datasets of a run, or the `extract` settings of one without; a lone checkpoint has neither."""

    urls: tuple[str, ...]
    live: Mapping[str, Any]
    live_content: Mapping[str, Any] = field(default_factory=dict)
    """What a run without a dataset recorded of what training sees."""
    interpreter: str | None = None
    """Folder of the one that labelled live samples, where it was named."""
    learned_labels: bool = True
    """Whether soft labels were learned from, where a dataset holds any."""

    @staticmethod
    def of(checkpoint: str) -> TrainedOn:
        """What the run of a checkpoint says; the folder may be named, or a file in it."""
        folder = Path(checkpoint).parent if Path(checkpoint).is_file() else Path(checkpoint)
        distill: dict[str, Any] = {}
        live: dict[str, Any] = {}
        with suppress(DtpipeError):
            distill = read_config(folder)
            live = read_config(folder, "extract")
        content: dict[str, Any] = {}
        with suppress(DtpipeError):
            content = (read_record(folder) or {}).get("live") or {}
        urls = tuple(map(str, distill.get("datasets") or ()))
        learned = (distill.get("labels") or {}).get("weight") != 0
        return TrainedOn(urls, live, content, distill.get("interpreter"), learned)

    def live_listing(self) -> tuple[LiveConfig, Listing]:
        """Settings and samples of a run on images without a dataset.

        Raises: ConfigError for settings of another version; InputError where the images are gone.
        """
        try:
            extract = LiveConfig.model_validate(LiveConfig.in_halves(self.live))
        except ValueError as err:
            raise ConfigError("its settings are not of this version; distil again") from err
        return extract, list_source(extract, open_images(extract.images, None, extract.source.kind))

    def live_transform(self) -> TransformRecipe | None:
        """How images came to the teacher's size in a run without a dataset; None where it does not say."""
        if "transform" in self.live_content:
            return TransformRecipe.model_validate(self.live_content["transform"])
        settings = TransformConfig.model_validate(self.live.get("transform") or {})
        if settings.px is None:
            return None
        height, width = height_width(settings.px)
        return TransformRecipe(
            resize=settings.resize, height=height, width=width, filter=settings.filter, antialias=settings.antialias
        )

    def teacher(self) -> RunTeacher:
        """The teacher of the first dataset of features, or the live one."""
        plan = self._plan()
        if plan is not None:
            recipe, transform = plan.recipe, plan.recipe.transform
            size = (transform.height, transform.width)
            return RunTeacher(recorded_teacher(plan), recipe.views[0].timestep, size, recipe.synthesized)
        px = self.live.get("transform", {}).get("px")
        timesteps = NoiseConfig.model_validate(self.live.get("noise", {})).timesteps
        timestep = timesteps[0] if timesteps else None  # a generator has none
        return RunTeacher(self.live.get("teacher", {}), timestep, height_width(px) if px else None)

    def _plan(self) -> Plan | None:
        with suppress(DtpipeError):
            return load_plan(Store(of_a_teacher(self.urls))) if self.urls else None
        return None


def of_a_teacher(urls: Sequence[str]) -> str:
    """The first of some datasets that holds features, or the first of all where none does or a plan cannot be read."""
    with suppress(DtpipeError):
        return next((url for url in urls if soft_labels_of(load_plan(Store(url)).recipe) is None), urls[0])
    return urls[0]
