"""Fresh soft labels: an interpreter behind the live teacher, on the trainer's device, for samples encoded anew.

One rule: the interpreter is that of the stored soft labels, by digest, so fresh and stored ones differ by noise alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.distill.labels.files import LoadedInterpreter, load_interpreter
from dtpipe.distill.labels.head import at_cells, label_level, levels_read, refuse_other_features, views_of
from dtpipe.distill.labels.interpreter import views_in_channels
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import LevelSpec, Recipe, ViewSpec
from dtpipe.manifests.soft_labels import LabelView, soft_labels_of
from dtpipe.pipeline.live.codecs import as_stored
from dtpipe.pipeline.live.recorded import recorded_soft_labels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_Views = NDArray[np.int64]


@dataclass(frozen=True)
class _Prepared:
    own: Any
    """Of the samples at their own views."""
    read: Sequence[tuple[LiveSamples, Any]]
    """The same samples at each view that the interpreter reads together; none where it reads one."""


@dataclass(frozen=True)
class Labelling:
    """A `LiveTeacher` whose levels include the soft labels of what it encodes."""

    teacher: LiveTeacher
    head: LoadedInterpreter
    level: LevelSpec
    """Of the soft labels, under its name in the source."""
    names: Mapping[str, str]
    """Levels as the teacher gives them, by the name that the interpreter knows."""
    reads: _Views
    """(V, n): views that are read together, by view of the source."""
    codec: LevelCodec | None = None
    """Of the level, where live soft labels are to be as stored ones."""

    @property
    def makes_images(self) -> bool:
        """As `LiveTeacher`."""
        return self.teacher.makes_images

    def prepare(self, samples: LiveSamples) -> _Prepared:
        """Noise of the samples at all views that are read."""
        together = self.reads[samples.views].T if self.reads.shape[1] > 1 else ()
        others = [LiveSamples(samples.keys, views, samples.flip, samples.fresh) for views in together]
        prepare = self.teacher.prepare
        return _Prepared(prepare(samples), [(other, prepare(other)) for other in others])

    def encode(self, images: Tensor, samples: LiveSamples, prepared: _Prepared) -> tuple[Tensor, Mapping[str, Tensor]]:
        """As `LiveTeacher.encode`, with logits averaged down to the soft labels' cells, and as they would be stored."""
        import torch

        shown, levels = self.teacher.encode(images, samples, prepared.own)
        read = [self.teacher.encode(images, other, ready)[1] for other, ready in prepared.read] or [levels]
        with torch.inference_mode():
            views = {name: [of_view[live].contiguous() for of_view in read] for name, live in self.names.items()}
            logits = self.head.network(views_in_channels(views))
        fresh = at_cells(logits, self.level).clone()
        return shown, {
            **levels,
            self.level.name: fresh if self.codec is None else as_stored(self.codec, fresh[:, None])[:, 0],
        }


def reads_of(views: Sequence[ViewSpec], labels: Sequence[LabelView]) -> _Views:
    """Which views are read together for the labels of each view: those of its draw and flip, or itself."""
    if all(len(label.reads) == 1 for label in labels):
        return np.arange(len(views))[:, None]
    of = {(label.view.draw, label.view.flip): label.reads for label in labels}
    return np.array([of[view.draw, view.flip] for view in views], np.int64)


def behind_dataset(
    teacher: LiveTeacher,
    labels: FeatureDataset,
    level: LevelSpec,
    features: Sequence[tuple[FeatureDataset, Mapping[str, str]]],
    path: str | None,
    device: torch.device,
) -> Labelling:
    """The interpreter of a dataset of soft labels behind the live teacher of the features joined to it.

    `features`: those datasets, with the names of their levels in the source. `path` is where the interpreter lies now.
    Raises: ConfigError when nothing says where it is, or none of the features is what it reads; TeacherError when
    another interpreter is there; as `load_interpreter`.
    """
    soft = soft_labels_of(labels.recipe)
    assert soft is not None
    path = path or recorded_soft_labels(labels.plan).get("interpreter")
    if path is None:
        raise ConfigError(f"{labels.url} does not say where its interpreter is; give it with --interpreter")
    head = load_interpreter(path, device)
    if head.digest != soft.head_blake3:
        raise TeacherError(
            f"{path} is not the interpreter that made {labels.url} (digest {head.digest[:16]}.., its labels are of "
            f"{soft.head_blake3[:16]}..); give that one with --interpreter"
        )
    dataset, names = _read_by(head, soft.features.get("dataset"), features)
    views = reads_of(dataset.recipe.views, views_of(head, dataset.recipe))
    own = {one.name: names.get(one.name, one.name) for one in head.network.spec.levels}
    (stored,) = labels.recipe.levels
    return Labelling(teacher, head, level, own, views, labels.codecs[stored.name])


def _read_by(
    head: LoadedInterpreter, digest: str | None, features: Sequence[tuple[FeatureDataset, Mapping[str, str]]]
) -> tuple[FeatureDataset, Mapping[str, str]]:
    """The features that the labels were made of; else the first of the teacher that the interpreter learned from; else
    the first.

    Raises: ConfigError when it cannot read them; TeacherError when it was trained on others.
    """
    weights = (head.record.get("teacher") or {}).get("weights_blake3")
    same = [pair for pair in features if pair[0].manifest is not None and pair[0].manifest.digest == digest]
    of_teacher = [pair for pair in features if pair[0].recipe.teacher.weights_blake3 == weights]
    chosen, names = [*same, *of_teacher, *features][0]
    refuse_other_features(head, chosen.recipe, chosen.url)
    levels_read(head.network.spec, chosen.recipe.levels, chosen.url)
    return chosen, names


@dataclass(frozen=True)
class LiveLabels:
    """An interpreter for features that are stored nowhere, and the level of its soft labels."""

    head: LoadedInterpreter
    level: LevelSpec


def live_labels(path: str, recipe: Recipe, device: str) -> LiveLabels:
    """The interpreter in a folder, for a teacher that runs as a recipe says.

    Raises: ConfigError when the teacher lacks what it reads, TeacherError when it was trained on another's features; as
    `load_interpreter`.
    """
    head = load_interpreter(path, device)
    refuse_other_features(head, recipe, "the teacher")
    read = levels_read(head.network.spec, recipe.levels, "the teacher")
    return LiveLabels(head, label_level(head.network.spec, read, recipe.student_px))


def behind_teacher(teacher: LiveTeacher, labels: LiveLabels, recipe: Recipe) -> Labelling:
    """An interpreter behind a teacher that runs over images, whose recipe gives its views."""
    names = {one.name: one.name for one in labels.head.network.spec.levels}
    views = reads_of(recipe.views, views_of(labels.head, recipe))
    return Labelling(teacher, labels.head, labels.level, names, views)
