"""What a run was trained on, as far as its folder says and is still there: keys of images, and the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtpipe.distill.engine.run_folder import read_config
from dtpipe.extract.config import LiveConfig, NoiseConfig
from dtpipe.extract.recipe import list_source
from dtpipe.extract.sources.registry import open_images
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import Plan, height_width
from dtpipe.manifests.store.store import Store
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

    @staticmethod
    def of(checkpoint: str) -> TrainedOn:
        """What the run of a checkpoint says."""
        distill: dict[str, Any] = {}
        live: dict[str, Any] = {}
        with suppress(DtpipeError):
            distill = read_config(Path(checkpoint))
            live = read_config(Path(checkpoint), "extract")
        return TrainedOn(tuple(map(str, distill.get("datasets") or ())), live)

    def keys(self) -> set[str]:
        """Keys of the images, of those datasets and sources that can still be read."""
        keys: set[str] = set()
        for url in self.urls:
            with suppress(DtpipeError):
                keys.update(FeatureDataset.open(url, allow_incomplete=True).columns.keys)
        if self.live.get("images"):
            with suppress(DtpipeError, ValueError):
                extract = LiveConfig.model_validate(LiveConfig.in_halves(self.live))
                keys.update(list_source(extract, open_images(extract.images, None, extract.source.kind)).keys)
        return keys

    def teacher(self) -> RunTeacher:
        """The teacher of the first dataset, or the live one."""
        plan = self._plan()
        if plan is not None:
            recipe, transform = plan.recipe, plan.recipe.transform
            size = (transform.height, transform.width)
            return RunTeacher(recorded_teacher(plan), recipe.views[0].timestep, size, recipe.synthesized)
        px = self.live.get("transform", {}).get("px")
        timestep = NoiseConfig.model_validate(self.live.get("noise", {})).timesteps[0]
        return RunTeacher(self.live.get("teacher", {}), timestep, height_width(px) if px else None)

    def _plan(self) -> Plan | None:
        with suppress(DtpipeError):
            return load_plan(Store(self.urls[0])) if self.urls else None
        return None
