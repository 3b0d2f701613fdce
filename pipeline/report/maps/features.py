"""What the networks of a run see in a few of its images: the teacher's levels, the regressor's output, the backbone's.

Pictures of teacher and regressor share one PCA basis per level, so that equal colours mean equal features. It is the
teacher's, over all images shown: a student far off would else take the colours for itself, and the teacher would look
flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.config import DistillConfig, DistillRecipeConfig
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.labels.targets import Targets, choose_targets
from dtpipe.distill.losses.whitening import Whitener
from dtpipe.distill.stream.batch import student_images
from dtpipe.distill.stream.data import OpenedData, TrainingData
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.stream.statistics import run_whitener
from dtpipe.distill.stream.timesteps import view_timesteps
from dtpipe.distill.student.distiller import (
    Distiller,
    build_distiller,
    student_size,
    with_timed_heads,
)
from dtpipe.distill.student.load import student_state
from dtpipe.distill.student.regressor import FeatureRegressor
from dtpipe.distill.student.timed import has_timed_heads
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.phases import phase
from dtpipe.manifests.read.source import FeatureSource, read_images
from dtpipe.manifests.schema import LevelSpec
from dtpipe.pipeline.live.data import recorded_data
from dtpipe.pipeline.report.maps.pca import pca_to_rgb

if TYPE_CHECKING:
    from torch import Tensor

Picture = NDArray[np.uint8]
Maps = Mapping[str, NDArray[np.float32]]
"""By level: (N, C, h, w)."""
RowIdxs = NDArray[np.int64]
Read = Callable[[RowIdxs, Sequence[str]], tuple[Picture, Mapping[str, NDArray[np.generic]]]]

_AT_ONCE = 4  # images: levels of a whole set would not fit into memory


@dataclass(frozen=True)
class SeenImages:
    """Some images of a run, and what is seen in them."""

    keys: tuple[str, ...]
    images: Picture
    """(N, H, W, 3) uint8."""
    teacher: Maps
    """Whitened as the loss whitens them."""
    regressed: Maps
    """The regressor's output, of the teacher's shapes."""
    backbone: Maps
    """The student's own level of the same stride; absent where the student has none."""

    def errors(self) -> dict[str, float]:
        """Mean squared error of the regressor's output by level; 1 is what a constant zero would get, since whitened
        features have unit variance."""
        return {
            name: float(np.square(self.regressed[name] - level, dtype=np.float64).mean())
            for name, level in self.teacher.items()
        }


@dataclass(frozen=True)
class RunFeatures:
    """Data and networks of a run, opened on the CPU."""

    source: FeatureSource
    levels: Sequence[LevelSpec]
    rows: RowIdxs
    """Of the images that the run trains on."""
    live: bool
    """True where the teacher runs for every image that is looked at."""
    read: Read
    model: Distiller
    whitener: Whitener
    image_px: tuple[int, int]

    @classmethod
    def open(cls, run: Path, config: DistillConfig) -> RunFeatures:
        """Raises: what the dataset's readers raise, or what loading the live teacher or the checkpoint raises."""
        with phase("opening data and student"):
            data, read, live = _open_to_read(run, config)
        targets = choose_targets(config, data)
        if not targets.features:
            raise ConfigError("the run learned from soft labels alone, and regresses no features to show")
        image_px = student_size(config, data.student_px)
        model = load_distiller(run, config, targets, image_px)
        return cls(
            data.source,
            targets.features,
            _rows(data),
            live,
            read,
            model,
            run_whitener(run, config.loss.whiten),
            image_px,
        )

    def choose(self, num: int, seed: int) -> RowIdxs:
        """Some rows drawn by the seed, ascending."""
        return _choose(self.rows, num, seed)

    def rows_of(self, keys: Sequence[str]) -> RowIdxs:
        """Rows of images by their keys, which must be among `run_keys`."""
        by_key = {self.source.columns.keys[row]: row for row in self.rows}
        return np.asarray([by_key[key] for key in keys], np.int64)

    def see(self, rows: RowIdxs) -> SeenImages:
        """Images and maps of rows: the first unflipped view, or of live training the first draw.

        Raises: what the dataset's readers raise.
        """
        parts = list(self.see_parts(rows))
        kinds = [[getattr(part, kind) for part in parts] for kind in ("teacher", "regressed", "backbone")]
        joined = [{name: np.concatenate([maps[name] for maps in kind]) for name in kind[0]} for kind in kinds]
        keys = tuple(key for part in parts for key in part.keys)
        return SeenImages(keys, np.concatenate([part.images for part in parts]), *joined)

    def see_parts(self, rows: RowIdxs) -> Iterator[SeenImages]:
        """The same, a few images at a time."""
        with phase("images through teacher and student", len(rows)) as seen:
            for start in range(0, len(rows), _AT_ONCE):
                yield self._see(rows[start : start + _AT_ONCE])
                seen.done = min(start + _AT_ONCE, len(rows))

    def _see(self, rows: RowIdxs) -> SeenImages:
        import torch

        names = [level.name for level in self.levels]
        images, features = self.read(rows, names)
        with torch.inference_mode():
            levels = self.model.student(student_images(torch.from_numpy(images), self.image_px))
            regressed = self.regressor(levels, self._timesteps(len(rows)))
            teacher = {name: self.whitener(name, torch.from_numpy(features[name])) for name in names}
        by_stride = dict(zip(self.model.student.strides, levels, strict=True))
        backbone = {level.name: by_stride[level.stride] for level in self.levels if level.stride in by_stride}
        maps = [
            {name: level.float().numpy() for name, level in kind.items()} for kind in (teacher, regressed, backbone)
        ]
        return SeenImages(tuple(self.source.columns.keys[row] for row in rows), images, *maps)

    @property
    def regressor(self) -> FeatureRegressor:
        """The run's; one that regresses nothing is refused when it is opened."""
        assert self.model.regressor is not None
        return self.model.regressor

    def _timesteps(self, num: int) -> dict[str, Tensor]:
        """Of the view that `read` gives."""
        import torch

        view = 0 if self.live else _unflipped(self.source)
        return {level.name: torch.full((num,), view_timesteps(self.source, level.name)[view]) for level in self.levels}


def run_keys(run: Path, config: DistillConfig) -> list[str]:
    """Keys of the images that a run trains on. Raises: what the dataset's readers raise."""
    _, opened = _open(run, config)
    return [opened.source.columns.keys[row] for row in _rows(opened)]


def load_distiller(run: Path, config: DistillRecipeConfig, targets: Targets, image_px: tuple[int, int]) -> Distiller:
    """Student and regressor of a run's last checkpoint, in eval mode on the CPU."""
    state = load_checkpoint(run / "last.pt", "distill")
    unpretrained = config.model_copy(update={"student": config.student.model_copy(update={"pretrained": False})})
    timed = with_timed_heads(unpretrained, has_timed_heads(state["regressor"]))
    model = build_distiller(timed, targets.features, image_px, labels=targets.labels)
    assert model.regressor is not None  # there are features
    model.student.load_state_dict(student_state(state, ema=True))
    model.regressor.load_state_dict(state["regressor"])
    return model.eval()


def pca_pairs(seen: SeenImages) -> dict[str, list[tuple[Picture, Picture]]]:
    """Per level and image the (teacher, regressor) pictures, each (h, w, 3) uint8."""
    pairs = {}
    for name, teacher in seen.teacher.items():
        pictures = pca_to_rgb([*teacher, *seen.regressed[name]], num_deciding=len(teacher))
        pairs[name] = list(zip(pictures[: len(teacher)], pictures[len(teacher) :], strict=True))
    return pairs


def backbone_pictures(seen: SeenImages) -> dict[str, list[Picture]]:
    """Per level and image the backbone's own, in one basis of a level over all images."""
    return {name: pca_to_rgb(list(levels)) for name, levels in seen.backbone.items()}


def _open(run: Path, config: DistillConfig) -> tuple[TrainingData, OpenedData]:
    here = config.run.model_copy(update={"out": str(run), "device": "cpu"})  # a run folder may have been moved
    config = config.model_copy(update={"run": here})
    data = recorded_data(run, config)
    return data, data.open(config)


def _rows(opened: OpenedData) -> RowIdxs:
    return np.asarray(opened.sampling.rows if opened.sampling else opened.source.columns.ok_rows)


def _choose(rows: RowIdxs, num: int, seed: int) -> RowIdxs:
    generator = np.random.Generator(np.random.Philox(seed))
    return np.sort(generator.choice(rows, size=min(num, len(rows)), replace=False))


def _open_to_read(run: Path, config: DistillConfig) -> tuple[OpenedData, Read, bool]:
    """The run's data, and how to read images and features of some of its rows: stored, or encoded now on the CPU."""
    import torch

    data, opened = _open(run, config)
    teacher = data.teacher(opened.source, torch.device("cpu"))
    if teacher is None:
        return opened, partial(_read_stored, opened.source), False
    return opened, partial(_encode, teacher, opened.source), True


def _read_stored(
    source: FeatureSource, rows: RowIdxs, names: Sequence[str]
) -> tuple[Picture, Mapping[str, NDArray[np.generic]]]:
    images, coded = source.read(rows, names, np.full(len(rows), _unflipped(source)))
    return images, coded.decode()


def _unflipped(source: FeatureSource) -> int:
    """The first view of an unflipped image."""
    return next((idx for idx, view in enumerate(source.views) if not view.flip), 0)


def _encode(
    teacher: LiveTeacher, source: FeatureSource, rows: RowIdxs, _names: Sequence[str]
) -> tuple[Picture, Mapping[str, NDArray[np.generic]]]:
    import torch

    samples = LiveSamples.first([source.columns.keys[row] for row in rows])
    images, levels = teacher.encode(torch.from_numpy(read_images(source, rows)), samples, teacher.prepare(samples))
    return images.numpy(), {name: level.float().numpy() for name, level in levels.items()}
